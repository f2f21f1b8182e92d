#include "checkpoint/record.h"

#include <algorithm>
#include <string>

#include "archive_builder.h"
#include "checkpoint/zip.h"
#include "doctest/doctest.h"
#include "exact.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::ParsedRecord;
using checkpoint::PickleCache;
using Status = checkpoint::ParsedRecord::Status;

namespace {

// Parses with windows of the given sizes, and again with what is asked for, as the layout stage does.
ParsedRecord parse(const std::string& record, size_t head_size, size_t tail_size, PickleCache& pickles, int* rounds) {
  const auto length = static_cast<int64_t>(record.size());
  for (int round = 1;; ++round) {
    head_size = std::min(head_size, record.size());
    tail_size = std::min(tail_size, record.size());
    const Exact head(std::string_view(record).substr(0, head_size));
    const Exact tail(std::string_view(record).substr(record.size() - tail_size));
    ParsedRecord parsed = checkpoint::parse_record(head.view(), tail.view(), length, pickles);
    if (rounds != nullptr) *rounds = round;
    if (parsed.status != Status::kNeedsMore) return parsed;
    REQUIRE(parsed.head <= std::min<int64_t>(length, checkpoint::kMaxWindowBytes));
    REQUIRE(parsed.tail <= std::min<int64_t>(length, checkpoint::kMaxWindowBytes));
    const bool grows = parsed.head > static_cast<int64_t>(head_size) || parsed.tail > static_cast<int64_t>(tail_size);
    if (!grows) return parsed;
    REQUIRE(round < 10);
    head_size = static_cast<size_t>(parsed.head);
    tail_size = static_cast<size_t>(parsed.tail);
  }
}

ParsedRecord parse(const std::string& record, size_t head_size, size_t tail_size, int* rounds = nullptr) {
  PickleCache none;
  ParsedRecord parsed = parse(record, head_size, tail_size, none, rounds);
  // What was parsed before, by any test, makes no difference.
  static PickleCache known;
  const ParsedRecord again = parse(record, head_size, tail_size, known, nullptr);
  REQUIRE(again.status == parsed.status);
  REQUIRE(again.reason == parsed.reason);
  REQUIRE(again.layout.dtype == parsed.layout.dtype);
  REQUIRE(again.layout.begin == parsed.layout.begin);
  REQUIRE(again.layout.sizes == parsed.layout.sizes);
  REQUIRE(again.layout.strides == parsed.layout.strides);
  return parsed;
}

ParsedRecord parse(const std::string& record) { return parse(record, checkpoint::kHeadBytes, checkpoint::kTailBytes); }

std::string storage_for(const TensorSpec& spec) {
  return std::string(static_cast<size_t>(spec.storage_elements * itemsize(spec)), 's');
}

const TensorSpec kSpec{0, {2, 3}, {3, 1}, 1, 8};

std::string record_of(const TensorSpec& spec) { return tensor_record(spec, storage_for(spec)); }

size_t find(const std::string& record, const std::string& text) {
  const size_t position = record.find(text);
  REQUIRE(position != std::string::npos);
  return position;
}

}  // namespace

TEST_CASE("a record gives dtype, sizes, strides and the place of the first element") {
  Random random(40);
  for (int i = 0; i < 400; ++i) {
    TensorSpec spec;
    spec.dtype = static_cast<checkpoint::DType>(random.below(checkpoint::kDTypes.size()));
    spec.sizes = random_sizes(random, random.below(5), random.chance(10) ? 0 : 1, 5);
    spec.strides = random_strides(random, spec.sizes);
    spec.storage_offset = random.between(0, 5);
    spec.storage_elements = spec.storage_offset + span_of(spec.sizes, spec.strides) + random.between(0, 300);
    spec.parameter = random.chance(20) && !spec.sizes.empty();
    std::string storage = storage_for(spec);
    const bool empty = std::find(spec.sizes.begin(), spec.sizes.end(), 0) != spec.sizes.end();
    const auto first = static_cast<size_t>(empty ? 0 : spec.storage_offset * itemsize(spec));
    if (!empty) storage[first] = '!';
    const std::string record = tensor_record(spec, storage, random.pick(std::vector<size_t>{1, 16, 64, 512, 4096}));
    const ParsedRecord parsed = parse(record);
    REQUIRE(parsed.reason == "");
    REQUIRE(parsed.status == Status::kTensor);
    REQUIRE(parsed.layout.dtype == spec.dtype);
    REQUIRE(parsed.layout.sizes == spec.sizes);
    REQUIRE(parsed.layout.strides == spec.strides);
    if (!empty) REQUIRE(record[static_cast<size_t>(parsed.layout.begin)] == '!');
  }
}

TEST_CASE("windows of every size lead to the same layout") {
  const std::string record = record_of(kSpec);
  const ParsedRecord whole = parse(record, record.size(), record.size());
  REQUIRE(whole.status == Status::kTensor);
  for (size_t head = 0; head <= record.size(); head += 31) {
    for (size_t tail = 98; tail <= record.size(); tail += 29) {
      const ParsedRecord parsed = parse(record, head, tail);
      REQUIRE(parsed.status == Status::kTensor);
      REQUIRE(parsed.layout.begin == whole.layout.begin);
    }
  }
}

TEST_CASE("one more read brings all that a large alignment needs") {
  const TensorSpec spec{0, {100000}, {1}, 0, 100000};
  for (const size_t alignment : {64, 256, 1024, 4096}) {
    CAPTURE(alignment);
    int rounds = 0;
    const std::string record = tensor_record(spec, storage_for(spec), alignment);
    const ParsedRecord parsed = parse(record, checkpoint::kHeadBytes, checkpoint::kTailBytes, &rounds);
    CHECK(parsed.status == Status::kTensor);
    CHECK(rounds <= 2);
    CHECK(rounds == (alignment <= 64 ? 1 : 2));
  }
  // Past any sensible header torch.load decides, and nothing large is read for it.
  for (const size_t alignment : {16384, 32768, 65536}) {
    const ParsedRecord parsed = parse(tensor_record(spec, storage_for(spec), alignment));
    CHECK((parsed.status == Status::kUnknown || parsed.status == Status::kTensor));
  }
}

TEST_CASE("a long directory is asked for") {
  Archive archive = Archive::of_tensor(tensor_pickle(kSpec), storage_for(kSpec));
  for (int i = 0; i < 40; ++i) archive.add("version", "3\n");
  const std::string record = archive.finish();
  const Exact head(std::string_view(record).substr(0, checkpoint::kHeadBytes));
  const Exact tail(std::string_view(record).substr(record.size() - checkpoint::kTailBytes));
  PickleCache pickles;
  const ParsedRecord first =
      checkpoint::parse_record(head.view(), tail.view(), static_cast<int64_t>(record.size()), pickles);
  CHECK(first.status == Status::kNeedsMore);
  CHECK(first.tail > checkpoint::kTailBytes);
  CHECK(first.head >= checkpoint::kHeadBytes);
  CHECK(parse(record).status == Status::kTensor);
}

TEST_CASE("records that contradict themselves are corrupt, and say how") {
  const std::string good = record_of(kSpec);
  const auto corrupt = [](const std::string& record, const std::string& reason) {
    const ParsedRecord parsed = parse(record);
    CHECK(parsed.status == Status::kCorrupt);
    CHECK(parsed.reason.find(reason) != std::string::npos);
  };
  std::string record = good;
  record[find(record, "FloatStorage") + 1] ^= 1;
  const ParsedRecord pickle = parse(record);
  CHECK(pickle.status == Status::kCorruptPickle);
  CHECK(pickle.reason.find("checksum of data.pkl") != std::string::npos);

  // The padding of the payload's local header says where the payload begins.
  for (const int shift : {-16, -8, -1, 1, 4, 8, 16, 24, 64}) {
    record = good;
    const size_t extra_size = find(record, "archive/data/0") - 2;
    record[extra_size] = static_cast<char>(record[extra_size] + shift);
    corrupt(record, "the local header of the storage points to another place");
  }

  corrupt(tensor_record(kSpec, std::string(31, 's')), "32 bytes of storage, the archive holds 31");
  corrupt(tensor_record(kSpec, std::string(33, 's')), "32 bytes of storage, the archive holds 33");
  TensorSpec spec = kSpec;
  spec.storage_offset = 3;
  corrupt(record_of(spec), "reaches past its storage");
  spec = kSpec;
  spec.strides = {6, 1};
  corrupt(record_of(spec), "reaches past its storage");
  spec.strides = {int64_t{1} << 62, int64_t{1} << 62};
  corrupt(record_of(spec), "reaches past its storage");
  spec = kSpec;
  spec.sizes = {INT64_MAX, INT64_MAX};
  corrupt(record_of(spec), "reaches past its storage");
  spec = kSpec;
  spec.storage_offset = INT64_MAX;
  corrupt(record_of(spec), "reaches past its storage");
  spec.storage_offset = INT64_MAX / 4;
  corrupt(record_of(spec), "reaches past its storage");

  record = good;
  record[find(record, "archive/data/0")] ^= 1;  // in the local header only
  corrupt(record, "local header of the storage");
}

TEST_CASE("data descriptors of all sizes that the format allows are read, and none lets damage shift the tensor") {
  for (const size_t descriptor : {0, 12, 16, 20, 24}) {
    for (const bool padded : {true, false}) {
      for (const bool far : {false, true}) {  // whether the descriptor lies outside of the first windows
        CAPTURE(descriptor);
        CAPTURE(padded);
        CAPTURE(far);
        TensorSpec spec = kSpec;
        spec.storage_elements = far ? 1000 : 8;
        std::string storage(static_cast<size_t>(spec.storage_elements * 4), '\0');  // zeros: an empty extra field
        storage[4] = '!';
        Archive archive;
        archive.descriptor = descriptor;
        archive.padded = padded;
        archive.add("data.pkl", tensor_pickle(spec));
        archive.add("data/0", storage);
        archive.add("version", std::string(far ? 2000 : 2, '3'));
        const std::string good = archive.finish();
        const ParsedRecord parsed = parse(good);
        REQUIRE(parsed.reason == "");
        REQUIRE(parsed.status == Status::kTensor);
        CHECK(good[static_cast<size_t>(parsed.layout.begin)] == '!');
        const size_t extra_size = find(good, "archive/data/0") - 2;
        for (int shift = -32; shift <= 32; ++shift) {
          if (shift == 0) continue;
          std::string record = good;
          const int size = static_cast<uint8_t>(good[extra_size]) + shift;
          record[extra_size] = static_cast<char>(size);
          record[extra_size + 1] = static_cast<char>(good[extra_size + 1] + (size < 0 ? -1 : size >> 8));
          CAPTURE(shift);
          REQUIRE(parse(record).status == Status::kCorrupt);
        }
      }
    }
  }
}

TEST_CASE("a data descriptor that no window of sensible size reaches is left to torch.load") {
  Archive archive;
  archive.padded = false;
  archive.add("data.pkl", tensor_pickle(kSpec));
  archive.add("data/0", storage_for(kSpec));
  archive.add("version", std::string(2 << 20, '3'));
  CHECK(parse(archive.finish(), 300, checkpoint::kTailBytes).status == Status::kUnknown);
}

TEST_CASE("sizes that overflow without strides to match are never a tensor of that size on trust") {
  TensorSpec spec = kSpec;
  spec.sizes = {int64_t{1} << 40, int64_t{1} << 40};
  spec.strides = {0, 0};  // an expanded tensor: consistent, and the program must refuse to copy it
  const ParsedRecord parsed = parse(record_of(spec));
  CHECK(parsed.status == Status::kTensor);
}

TEST_CASE("an empty tensor may have any offset and any strides") {
  TensorSpec spec{0, {3, 0}, {1, 1}, 0, 0};
  CHECK(parse(record_of(spec)).status == Status::kTensor);
  spec.sizes = {0, 5};
  spec.strides = {5, 1};
  spec.storage_offset = 7;
  CHECK(parse(record_of(spec)).status == Status::kTensor);
  spec.strides = {1, int64_t{1} << 62};
  CHECK(parse(record_of(spec)).status == Status::kTensor);
  spec.sizes = {5, 0};
  spec.strides = {int64_t{1} << 62, 1};
  CHECK(parse(record_of(spec)).status == Status::kTensor);
}

TEST_CASE("checksum 0 means that none was computed") {
  Archive archive = Archive::of_tensor(tensor_pickle(kSpec), storage_for(kSpec));
  archive.checksums = false;
  CHECK(parse(archive.finish()).status == Status::kTensor);
}

TEST_CASE("a pickle is known by all its bytes and its checksum, until four others came") {
  std::vector<std::string> pickles;
  for (int64_t size = 1; size <= 5; ++size) pickles.push_back(tensor_pickle({0, {size}, {1}, 0, size}));
  const auto view = [](const std::string& text) {
    return checkpoint::Bytes(reinterpret_cast<const std::byte*>(text.data()), text.size());
  };
  const auto parsed = [&view](const std::string& text) { return *checkpoint::parse_tensor_pickle(view(text)); };
  PickleCache known;
  CHECK(known.find(checkpoint::Bytes(), 0) == nullptr);
  CHECK(known.keep(view(pickles[0]), 7, parsed(pickles[0]))->sizes == std::vector<int64_t>{1});
  REQUIRE(known.find(view(std::string(pickles[0])), 7) != nullptr);
  CHECK(known.find(view(pickles[0]), 7)->sizes == std::vector<int64_t>{1});
  CHECK(known.find(view(pickles[0]), 8) == nullptr);
  CHECK(known.find(view(pickles[1]), 7) == nullptr);
  CHECK(known.find(view(pickles[0].substr(1)), 7) == nullptr);
  for (size_t i = 1; i < pickles.size(); ++i) known.keep(view(pickles[i]), 7, parsed(pickles[i]));
  CHECK(known.find(view(pickles[0]), 7) == nullptr);
  CHECK(known.find(view(pickles[1]), 7)->sizes == std::vector<int64_t>{2});
  CHECK(known.find(view(pickles[4]), 7)->sizes == std::vector<int64_t>{5});
}

TEST_CASE("what torch.save of a plain tensor never writes is left to torch.load") {
  const std::string pickle = tensor_pickle(kSpec);
  const std::string storage = storage_for(kSpec);
  const auto unknown = [](const Archive& archive) { CHECK(parse(archive.finish()).status == Status::kUnknown); };
  Archive archive = Archive::of_tensor(pickle, storage);
  archive.add("code/module.py", "pass");
  unknown(archive);
  archive = Archive::of_tensor(pickle, storage);
  archive.add("data/1", storage);
  unknown(archive);
  archive = Archive::of_tensor(pickle, storage);
  archive.add("data.pkl", pickle);
  unknown(archive);
  unknown(Archive::of_tensor(pickle, storage, 64, "big"));
  unknown(Archive::of_tensor(Pickle().protocol(2).raw("}.").bytes, storage));
  unknown(Archive::of_tensor("", storage));
  Archive bare;
  bare.add("data/0", storage);
  unknown(bare);
  Archive alone;
  alone.add("data.pkl", pickle);
  unknown(alone);
  TensorSpec spec = kSpec;
  spec.key = "1";
  unknown(Archive::of_tensor(tensor_pickle(spec), storage));
  for (const char* text :
       {"", "x", "PK\x05\x06", "not an archive at all, but long enough to hold the end of one, as it seems....."}) {
    CHECK(parse(text).status == Status::kUnknown);
  }
}

TEST_CASE("the entries of a record lie in one folder") {
  // Two archives' entries in one directory: torch.load looks for the storage beside data.pkl and finds none.
  Archive archive;
  archive.add("data.pkl", tensor_pickle(kSpec));
  archive.root = "other";
  archive.add("data/0", storage_for(kSpec));
  CHECK(parse(archive.finish()).status != Status::kTensor);
}

TEST_CASE("archives without byte order, of other names and without zip64 are read") {
  for (const char* root : {"archive", "a", "some.folder-name"}) {
    for (const bool zip64 : {true, false}) {
      Archive archive;
      archive.root = root;
      archive.zip64_end = zip64;
      archive.add("data.pkl", tensor_pickle(kSpec));
      archive.add("data/0", storage_for(kSpec));
      archive.add("version", "3\n");
      CHECK(parse(archive.finish()).status == Status::kTensor);
    }
  }
}

TEST_CASE("damage anywhere is never read out of bounds, and a tensor stays within its record") {
  Random random(41);
  int tensors = 0;
  for (int i = 0; i < 10000; ++i) {
    TensorSpec spec = kSpec;
    spec.dtype = static_cast<checkpoint::DType>(i % static_cast<int>(checkpoint::kDTypes.size()));
    Archive archive = Archive::of_tensor(tensor_pickle(spec), storage_for(spec));
    archive.checksums = i % 2 == 0;  // without them damage reaches the unpickler
    std::string record = archive.finish();
    for (int64_t flips = random.between(1, 3); flips > 0; --flips) {
      const size_t area = random.chance(50) ? 300 : record.size();
      const size_t position = random.chance(50) ? random.below(area) : record.size() - 1 - random.below(area);
      record[position] = static_cast<char>(random.between(0, 255));
    }
    if (random.chance(5)) record.resize(random.below(record.size()));
    const ParsedRecord parsed = parse(record, random.below(1500), random.below(1000));
    if (parsed.status != Status::kTensor) continue;
    ++tensors;
    const int64_t span = span_of(parsed.layout.sizes, parsed.layout.strides);
    REQUIRE(parsed.layout.begin >= 0);
    REQUIRE(parsed.layout.begin <= static_cast<int64_t>(record.size()));
    if (span > 0) {
      const int64_t bytes = span * checkpoint::info(parsed.layout.dtype).itemsize;
      REQUIRE(bytes <= static_cast<int64_t>(record.size()) - parsed.layout.begin);
    }
  }
  CHECK(tensors > 500);
}
