// Columns that pass from one process to another: the same on the other side; and whatever else arrives there, an error
// or columns that hold together.
#include "metadata/columns_stream.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "exact.h"
#include "metadata/failure.h"
#include "metadata/metadata_pickle.h"
#include "metadata/parse.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using metadata::Columns;
using metadata::ColumnsDecoder;
using metadata::ColumnsEncoder;
using metadata::StorageRows;

namespace {

constexpr uint64_t kFileBytes = 10'000;

struct Stream {
  std::vector<uint64_t> sizes;
  std::string bytes;
};

Stream encode(Columns columns, size_t step = 1000) {
  ColumnsEncoder encoder(std::make_shared<Columns>(std::move(columns)), kFileBytes);
  Stream stream{encoder.sizes(), {}};
  for (size_t count = step; count == step;) {
    std::vector<std::byte> block(step);
    count = encoder.read(block.data(), step);
    stream.bytes.append(reinterpret_cast<const char*>(block.data()), count);
  }
  return stream;
}

Columns decode(const Stream& stream, size_t step = 1000) {
  ColumnsDecoder decoder(stream.sizes, kFileBytes);
  for (size_t at = 0; at < stream.bytes.size(); at += step) {
    const Exact block(std::string_view(stream.bytes).substr(at, step));
    decoder.write(block.data(), block.size());
  }
  return decoder.finish();
}

// Columns that are the same are the same stream, and to encode them is to look at all that they refer to.
void check_same(const Stream& stream, const Columns& columns) {
  const StorageRows& rows = columns.rows;
  for (uint32_t row = 0; row < rows.size(); ++row) {
    const int64_t* offset = columns.numbers.data() + rows.chunk_offset[row];
    REQUIRE(columns.find_row(rows.fqn[row], offset, rows.dims[row]) == row);
  }
  const Stream again = encode(columns);
  REQUIRE(again.sizes == stream.sizes);
  REQUIRE(again.bytes == stream.bytes);
}

void refused(const Stream& stream) {
  try {
    decode(stream);
  } catch (const Error& error) {
    CHECK(error.kind == ErrorKind::kCorruptMetadata);
    return;
  }
  FAIL("not an error");
}

Columns parse(const std::string& pickle) {
  const Exact exact(pickle);
  metadata::MemorySource source(exact.view());
  return metadata::parse(source);
}

std::string with_storage_meta(std::string pickle) {
  const std::string meta = object("StorageMeta") + "}(" + text("checkpoint_id") + global("pathlib", "PosixPath") +
                           text("/") + text("a") + "\x86R" + text("save_id") + text("s") + "ub";
  pickle.resize(pickle.size() - std::string("ub.").size());
  return pickle + text("storage_meta") + meta + text("version") + text("1.0.0") + "ub.";
}

Columns everything() {
  const std::string entries = text("a") + tensor({3, 300}, list({chunk({0, 0}, {2, 300}), chunk({2, 0}, {1, 300})})) +
                              text("b\xc3\xa4") + object("BytesStorageMetadata") + text("c") + tensor({}, "]");
  const std::string storage = index("a", size({2, 0})) + storage_info("f", 5, 6) + index("b", "N") +
                              storage_info("g", -1, INT64_MAX, list({text("zstd"), text("b64")})) +
                              index("c", size({})) + storage_info("f", 7, 8, ")");
  const std::string planner_data = "}(" + text("a") + text("a") + "\x85" + text("x") +
                                   list({number(-1), "]", "}", ")", "G" + std::string(8, '\x40'), "\x88"}) + "q\x01" +
                                   text("same") + "h\x01" + number(5) + "Nu";
  return parse(with_storage_meta(pickle_of(entries, storage, planner_data)));
}

Columns random_columns(Random& random) {
  const std::string pickle = random_pickle(random);
  return parse(random.chance(50) ? with_storage_meta(pickle) : pickle);
}

void damage(Random& random, Stream& stream) {
  static const std::vector<uint64_t> kNumbers = {0, 1, 2, 64, 65, UINT32_MAX, uint64_t{1} << 62, UINT64_MAX};
  const size_t at = random.below(stream.bytes.size() + 1);
  const size_t length = std::min<size_t>(random.pick(std::vector<size_t>{1, 4, 8, 40}), stream.bytes.size() - at);
  switch (random.below(6)) {
    case 0:
      stream.bytes.resize(at);
      return;
    case 1:
      stream.bytes.replace(at, length, random.bytes(length));
      return;
    case 2: {  // a whole number, wherever in the stream numbers may be
      const std::string number = little_endian(random.pick(kNumbers), random.chance(50) ? 4 : 8);
      const size_t aligned = at & ~size_t{3};
      if (aligned + number.size() <= stream.bytes.size()) stream.bytes.replace(aligned, number.size(), number);
      return;
    }
    case 3:
      stream.sizes[random.below(stream.sizes.size())] = random.pick(kNumbers);
      return;
    case 4: {  // bytes move from one section to another
      const uint64_t moved = random.pick(std::vector<uint64_t>{1, 4, 8});
      uint64_t& from = stream.sizes[random.below(stream.sizes.size())];
      if (from >= moved) {
        from -= moved;
        stream.sizes[random.below(stream.sizes.size())] += moved;
      }
      return;
    }
    default:
      if (at < stream.bytes.size()) stream.bytes[at] = static_cast<char>(stream.bytes[at] ^ (1 << random.below(8)));
  }
}

}  // namespace

TEST_CASE("columns are the same on the other side, however the stream is cut into blocks") {
  const Columns columns = everything();
  const Stream stream = encode(columns);
  for (size_t step = 1; step <= stream.bytes.size(); ++step) {
    CHECK(encode(columns, step).bytes == stream.bytes);
    const Columns decoded = decode(stream, step);
    check_same(stream, decoded);
  }
  const Columns decoded = decode(stream);
  CHECK(decoded.fqns[1] == "b\xc3\xa4");
  CHECK(decoded.version == "1.0.0");
  CHECK(decoded.planner_data == columns.planner_data);
  CHECK(decoded.storage_meta == columns.storage_meta);
  CHECK(decoded.transforms == columns.transforms);
  CHECK(decoded.rows.transforms == std::vector<uint32_t>{0, 1, 2});
  CHECK(decoded.entries[0].chunk_count == 2);
  CHECK(decoded.numbers == columns.numbers);
}

TEST_CASE("random columns are the same on the other side") {
  Random random(21);
  for (int i = 0; i < 2'000; ++i) {
    const Stream stream = encode(random_columns(random));
    check_same(stream, decode(stream, 1 + random.below(100)));
  }
}

TEST_CASE("a damaged stream is an error, or other columns that hold together") {
  Random random(22);
  int decoded = 0;
  int failed = 0;
  for (int i = 0; i < 20'000; ++i) {
    Stream stream = encode(random_columns(random));
    for (int64_t left = random.between(1, 3); left > 0; --left) damage(random, stream);
    try {
      check_same(stream, decode(stream));
      ++decoded;
    } catch (const Error& error) {
      REQUIRE(error.kind == ErrorKind::kCorruptMetadata);
      ++failed;
    }
  }
  CHECK(decoded > 1'000);
  CHECK(failed > 5'000);
}

TEST_CASE("a stream that ends early, or late, is an error") {
  const Stream stream = encode(everything());
  for (size_t length = 0; length < stream.bytes.size(); ++length) {
    refused({stream.sizes, stream.bytes.substr(0, length)});
  }
  refused({stream.sizes, stream.bytes + '\0'});
}

TEST_CASE("sizes that no file of that size has are an error before any memory is taken") {
  const Stream stream = encode(everything());
  for (size_t section = 0; section < stream.sizes.size(); ++section) {
    Stream other = stream;
    for (const uint64_t size : {uint64_t{1} << 40, UINT64_MAX & ~uint64_t{7}, uint64_t{8} * (kFileBytes + 1)}) {
      if (section == 0 && size < uint64_t{1} << 40) continue;
      other.sizes[section] = size;
      refused(other);
    }
  }
  refused({{}, stream.bytes});
  Stream more = stream;
  more.sizes.push_back(0);
  refused(more);
}

TEST_CASE("pickles that the parser would not have written are an error, and are not sent") {
  const Columns columns = everything();
  const Stream stream = encode(columns);
  const auto replaced = [&](const std::string& pickle, const std::string& other) {
    Stream result = stream;
    const size_t at = stream.bytes.find(pickle) - sizeof(uint64_t);
    REQUIRE(at < stream.bytes.size());
    result.bytes.replace(at, sizeof(uint64_t) + pickle.size(), little_endian(other.size(), 8) + other);
    result.sizes[0] += other.size();
    result.sizes[0] -= pickle.size();
    return result;
  };
  const std::string plain = "\x80\x04}r" + little_endian(0, 4) + "(u.";
  CHECK_NOTHROW(decode(replaced(columns.planner_data, plain)));
  for (const std::string& pickle :
       {std::string(), std::string("N."), std::string("\x80\x04}."), plain + "N",
        "\x80\x04" + global("os", "system") + text("ls") + "\x85R.", "\x80\x04" + global("torch", "Size") + ")\x85R.",
        "\x80\x04" + object("StorageMeta") + "."}) {
    CAPTURE(pickle);
    refused(replaced(columns.planner_data, pickle));
    Columns bad = columns;
    bad.planner_data = pickle;
    CHECK_THROWS_AS(encode(std::move(bad)), metadata::Unsupported);
  }
  refused(replaced(columns.storage_meta, plain));  // no tuple
}

TEST_CASE("columns that contradict themselves are an error") {
  const auto changed = [](auto change) {
    Columns columns = everything();
    change(columns);
    refused(encode(std::move(columns)));
  };
  changed([](Columns& columns) { columns.rows.fqn[0] = 4; });
  changed([](Columns& columns) { columns.rows.file[2] = 2; });
  changed([](Columns& columns) { columns.rows.dims[0] = 65; });
  changed([](Columns& columns) { columns.rows.chunk_offset[0] = columns.numbers.size() - 1; });
  changed([](Columns& columns) { columns.rows.chunk_offset[0] = UINT64_MAX; });
  changed([](Columns& columns) { columns.rows.transforms[0] = 3; });
  changed([](Columns& columns) { columns.rows.transforms.pop_back(); });
  changed([](Columns& columns) { columns.rows.index.pop_back(); });
  changed([](Columns& columns) {  // two rows with the same key
    columns.rows.fqn[2] = columns.rows.fqn[1];
    columns.rows.dims[2] = columns.rows.dims[1];
  });
  changed([](Columns& columns) { columns.entries[0].chunks = columns.numbers.size() - 7; });
  changed([](Columns& columns) { columns.entries[0].size = UINT64_MAX; });
  changed([](Columns& columns) { columns.entries[0].dims = 65; });
  changed([](Columns& columns) { columns.entries[2].chunk_count = kFileBytes + 1; });
  changed([](Columns& columns) { columns.entries[0].properties.dtype = 47; });
  changed([](Columns& columns) { columns.entries[0].properties.layout = 8; });
  changed([](Columns& columns) { columns.entries.resize(5); });
  changed([](Columns& columns) { columns.files.add("\xff"); });
}

TEST_CASE("columns that no decoder takes are not sent") {
  const auto make = [](int64_t number, uint64_t file_bytes) {
    const auto columns = std::make_shared<Columns>(parse(pickle_of(text("a") + tensor({number}, "]"))));
    ColumnsEncoder encoder(columns, file_bytes);
  };
  CHECK_NOTHROW(make((int64_t{1} << 62) - 1, kFileBytes));
  CHECK_THROWS_AS(make(int64_t{1} << 62, kFileBytes), metadata::Unsupported);
  CHECK_THROWS_AS(make(1, 0), metadata::Unsupported);
}
