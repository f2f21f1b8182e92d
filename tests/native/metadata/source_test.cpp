// Metadata files read through windows of any size or sent in blocks of any size, and reads that fail.
#include "metadata/source.h"

#include <cerrno>
#include <cstdint>
#include <optional>
#include <string>

#include "doctest/doctest.h"
#include "exact.h"
#include "faults.h"
#include "io/file_reading.h"
#include "metadata/columns_text.h"
#include "metadata/metadata_pickle.h"
#include "metadata/pickler.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::FaultFunction;
using metadata::Batches;

namespace {

bool never() { return false; }

// A little of everything, with opcodes of all lengths.
std::string sample() {
  const std::string chunks = list({chunk({0, 0}, {2, 3}), chunk({2, 0}, {1, 3})});
  const std::string entries = text("a") + tensor({3, 3}, chunks) + text("b") + object("BytesStorageMetadata") +
                              text("caf\xc3\xa9") + tensor({}, "]");
  const std::string storage = index("a", size({2, 0})) + storage_info("f", 5, 6) + index("b", "N") +
                              storage_info("g", -1, INT64_MAX, list({text("zstd")}));
  return pickle_of(entries, storage, "}" + text("k") + "G" + std::string(8, '\x40') + "sq\x01");
}

std::string read_through(const std::string& path, size_t window, Batches batches) {
  const OpenFile file(path);
  metadata::FileSource source(file, never, window);
  return parsed(source, batches);
}

std::string in_blocks(const std::string& pickle, size_t block, Batches batches, size_t kept = SIZE_MAX,
                      size_t blocks = SIZE_MAX) {
  size_t sent = 0;
  std::optional<Exact> next;
  metadata::BlockSource source(
      pickle.size(),
      [&]() -> checkpoint::Bytes {
        if (blocks-- == 0) return {};
        next.emplace(pickle.substr(sent, block));
        sent += block;
        return next->view();
      },
      kept);
  return parsed(source, batches);
}

// Batches longer than a thousand bytes, whose last one ends otherwise if it is not `sound`.
std::string long_batches(bool sound) {
  Pickler out(4);
  out.name("state_dict_metadata");
  out.pickle() += '}';
  out.put();
  out.pickle() += '(';
  for (int tensor = 0; tensor < 3; ++tensor) {
    out.text("t" + std::to_string(tensor));
    out.begin_object(kCheckpoint, "TensorStorageMetadata");
    out.name("properties");
    out.pickle() += properties();
    out.name("size");
    out.size({1000});
    out.name("chunks");
    out.pickle() += "](";
    for (int64_t i = 0; i < 500; ++i) {
      out.begin_object(kCheckpoint, "ChunkStorageMetadata");
      out.name("offsets");
      out.size({2 * i});
      out.name("sizes");
      out.size({2});
      out.pickle() += "ub";
    }
    out.pickle() += sound || tensor < 2 ? "eub" : "Neub";
  }
  out.pickle() += 'u';
  return out.finish();
}

}  // namespace

TEST_CASE("a window of any size gives the same columns") {
  const TempDir folder;
  const std::string pickle = sample();
  const std::string path = folder.write("metadata", pickle);
  const std::string expected = parsed(pickle, Batches::kOneByOne);
  REQUIRE(expected.find("a tensor 3,3, ") == 0);
  for (const Batches batches : {Batches::kOneByOne, Batches::kAtOnce}) {
    // The first window ends at every position there is.
    for (size_t window = 1; window <= pickle.size() + 1; ++window) {
      CAPTURE(window);
      REQUIRE(read_through(path, window, batches) == expected);
      REQUIRE(in_blocks(pickle, window, batches) == expected);
    }
  }
}

TEST_CASE("a cut file is corrupt in the same place with a window of any size") {
  const TempDir folder;
  const std::string pickle = sample();
  for (size_t length = 0; length < pickle.size(); length += 7) {
    const std::string cut = pickle.substr(0, length);
    const std::string path = folder.write("metadata", cut);
    for (const size_t window : {1, 3, 64}) {
      REQUIRE(read_through(path, window, Batches::kAtOnce) == parsed(cut, Batches::kOneByOne));
      REQUIRE(in_blocks(cut, window, Batches::kAtOnce) == parsed(cut, Batches::kOneByOne));
    }
  }
}

TEST_CASE("batches that are longer than the window") {
  const TempDir folder;
  for (const bool sound : {true, false}) {
    const std::string pickle = long_batches(sound);
    const std::string path = folder.write("metadata", pickle);
    const std::string expected = parsed(pickle, Batches::kOneByOne);
    CHECK(expected.find(sound ? "t0 tensor 1000, 0,2,2,2,4,2," : "a chunk of another type") == 0);
    for (const size_t window : {1, 5000, 7001, 1 << 20}) {
      CAPTURE(window);
      CHECK(read_through(path, window, Batches::kAtOnce) == expected);
      CHECK(in_blocks(pickle, window, Batches::kAtOnce) == expected);
    }
  }
}

TEST_CASE("blocks are kept only as far back as they are to be") {
  const std::string pickle = long_batches(true);
  CHECK(in_blocks(pickle, 100, Batches::kAtOnce, 5000) == parsed(pickle, Batches::kOneByOne));
  CHECK(in_blocks(long_batches(false), 100, Batches::kAtOnce, 5000).find("a batch that is longer") == 0);
}

TEST_CASE("blocks that end early leave the metadata to others") {
  const std::string pickle = sample();
  for (size_t blocks = 0; blocks < pickle.size(); ++blocks) {
    REQUIRE(in_blocks(pickle, 1, Batches::kOneByOne, SIZE_MAX, blocks).find("blocks that end early") == 0);
  }
}

TEST_CASE("every read that fails is an error with the path, and short reads are none") {
  const TempDir folder;
  const std::string path = folder.write("metadata", sample());
  const std::string expected = parsed(sample(), Batches::kOneByOne);
  const OpenFile file(path);
  metadata::FileSource source(file, never, 64);
  const auto parse_with = [&](const io::Fault& fault) {
    io::FaultySystemCalls calls(fault);
    const ScopedCalls scope(calls);
    // Without the reader of batches, which looks further ahead than the file is long.
    const std::string text = text_of(metadata::parse(source, Batches::kOneByOne));
    return calls.calls() <= fault.nth ? "no such call" : text;
  };
  int64_t count = 0;
  for (bool done = false; !done; ++count) {
    CAPTURE(count);
    try {
      done = parse_with(fault(FaultFunction::kPread, count, EIO)) == "no such call";
      REQUIRE(done);
    } catch (const Error& error) {
      REQUIRE(error.kind == ErrorKind::kIo);
      REQUIRE(error.error_number == EIO);
      REQUIRE(error.path == path);
      REQUIRE(error.offset >= 0);
    }
  }
  CHECK(count > 5);
  for (int64_t nth = 0; nth + 1 < count; ++nth) {
    CAPTURE(nth);
    CHECK(parse_with(fault(FaultFunction::kPread, nth, 0)) == expected);
    CHECK(parse_with(fault(FaultFunction::kPread, nth, EINTR)) == expected);
  }
  // The file became shorter.
  try {
    parse_with(fault(FaultFunction::kPread, 1, 0, 1, 0));
    FAIL("not an error");
  } catch (const Error& error) {
    CHECK(error.kind == ErrorKind::kTruncated);
    CHECK(error.path == path);
  }
}

TEST_CASE("an interrupted read stops") {
  const TempDir folder;
  const std::string path = folder.write("metadata", sample());
  const OpenFile file(path);
  int asked = 0;
  metadata::FileSource source(file, [&] { return ++asked == 3; }, 64);
  CHECK_THROWS_AS(metadata::parse(source, Batches::kOneByOne), Interrupted);
  CHECK(asked == 3);
}
