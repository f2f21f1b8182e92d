// Damaged metadata under the sanitizers: columns that hold together, or an error; never more memory than a small
// multiple of the file.
#include <algorithm>
#include <cstdint>
#include <string>
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
using metadata::StorageRows;

namespace {

std::string damaged(Random& random, std::string pickle, const std::string& other) {
  const size_t at = random.below(pickle.size() + 1);
  const size_t length = std::min<size_t>(random.pick(std::vector<size_t>{1, 2, 5, 40}), pickle.size() - at);
  switch (random.below(7)) {
    case 0:
      return pickle.substr(0, at);
    case 1:
      return pickle.erase(at, length);
    case 2:
      return pickle.insert(at, other, random.below(other.size()), length);
    case 3:
      return pickle.replace(at, length, other, random.below(other.size()), length);
    case 4:
      return pickle.replace(at, length, random.bytes(length));
    case 5:
      return pickle.replace(at, length, std::string(length, '\xff'));
    default:
      if (at < pickle.size()) pickle[at] = static_cast<char>(pickle[at] ^ (1 << random.below(8)));
      return pickle;
  }
}

Columns parse(const std::string& pickle) {
  const Exact bytes(pickle);
  metadata::MemorySource source(bytes.view());
  return metadata::parse(source);
}

// Looks at every number that an entry or row points to.
void check_whole(const Columns& columns, size_t file_size) {
  REQUIRE(columns.entries.size() <= columns.fqns.size());
  REQUIRE(columns.numbers.size() <= file_size);
  REQUIRE(columns.planner_data.size() <= 16 * file_size + 16);
  for (const metadata::Entry& entry : columns.entries) {
    if (entry.kind == metadata::EntryKind::kBytes) continue;
    REQUIRE(entry.size + entry.dims <= columns.numbers.size());
    REQUIRE(entry.chunks + uint64_t{2} * entry.dims * entry.chunk_count <= columns.numbers.size());
  }
  const StorageRows& rows = columns.rows;
  for (uint32_t row = 0; row < rows.size(); ++row) {
    REQUIRE(rows.fqn[row] < columns.fqns.size());
    REQUIRE(rows.file[row] < columns.files.size());
    const uint32_t dims = rows.dims[row];
    REQUIRE((dims == StorageRows::kNoOffset || rows.chunk_offset[row] + dims <= columns.numbers.size()));
    REQUIRE(columns.find_row(rows.fqn[row], columns.numbers.data() + rows.chunk_offset[row], dims) == row);
  }
}

}  // namespace

TEST_CASE("damaged metadata is an error or columns that hold together") {
  Random random(7);
  int parsed = 0;
  int failed = 0;
  for (int i = 0; i < 15'000; ++i) {
    std::string pickle = random_pickle(random);
    const std::string other = random_pickle(random);
    for (int64_t left = random.between(0, 3); left > 0; --left) pickle = damaged(random, std::move(pickle), other);
    try {
      check_whole(parse(pickle), pickle.size());
      ++parsed;
    } catch (const Error& error) {
      REQUIRE(error.kind == ErrorKind::kCorruptMetadata);
      REQUIRE(error.offset >= 0);
      REQUIRE(error.offset + error.length <= static_cast<int64_t>(pickle.size()));
      ++failed;
    } catch (const metadata::Unsupported&) {
      ++failed;
    }
  }
  CHECK(parsed > 2'000);
  CHECK(failed > 2'000);
}

TEST_CASE("random opcodes are an error") {
  Random random(8);
  const std::vector<std::string> opcodes = {"N",
                                            "K\x01",
                                            "(",
                                            ")",
                                            "t",
                                            "\x85",
                                            "\x86",
                                            "\x87",
                                            "]",
                                            "a",
                                            "e",
                                            "}",
                                            "s",
                                            "u",
                                            "0",
                                            "1",
                                            "\x94",
                                            "h\x01",
                                            "h\x02",
                                            "q\x05",
                                            "R",
                                            "\x81",
                                            "b",
                                            "l",
                                            "d",
                                            text("offsets"),
                                            text("a"),
                                            size({1, 2}),
                                            global(kCheckpoint, "ChunkStorageMetadata"),
                                            object("Metadata"),
                                            object("MetadataIndex"),
                                            chunk({0}, {1}),
                                            tensor({1}, "]"),
                                            storage_info("f", 1, 2)};
  for (int i = 0; i < 15'000; ++i) {
    std::string pickle;
    for (int64_t left = random.between(1, 60); left > 0; --left) pickle += random.pick(opcodes);
    pickle += '.';
    try {
      parse(pickle);
    } catch (const Error&) {
      continue;
    } catch (const metadata::Unsupported&) {
      continue;
    }
  }
}
