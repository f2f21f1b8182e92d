#include "metadata/parse.h"

#include <cstdint>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "exact.h"
#include "metadata/failure.h"
#include "metadata/metadata_pickle.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using metadata::Columns;
using metadata::EntryKind;
using metadata::HashTable;
using metadata::StorageRows;
using metadata::Unsupported;

namespace {

using Numbers = std::vector<int64_t>;

Columns parse(const std::string& pickle) {
  const Exact bytes(pickle);
  metadata::MemorySource source(bytes.view());
  return metadata::parse(source);
}

// Parses what must be corrupt, and returns where.
int64_t corrupt_at(const std::string& pickle) {
  try {
    parse(pickle);
  } catch (const Error& error) {
    REQUIRE(error.kind == ErrorKind::kCorruptMetadata);
    REQUIRE(error.offset >= 0);
    REQUIRE(error.length >= 0);
    REQUIRE(error.offset + error.length <= static_cast<int64_t>(pickle.size()));
    return error.offset;
  }
  FAIL("not an error");
  return -1;
}

Numbers numbers(const Columns& columns, uint64_t at, size_t count) {
  const auto begin = columns.numbers.begin() + static_cast<std::ptrdiff_t>(at);
  return {begin, begin + static_cast<std::ptrdiff_t>(count)};
}

}  // namespace

TEST_CASE("entries, chunks and storage rows become columns") {
  const std::string chunks = list({chunk({0, 0}, {2, 3}), chunk({2, 0}, {1, 3})});
  const std::string entries =
      text("a") + tensor({3, 3}, chunks) + text("b") + object("BytesStorageMetadata") + text("c") + tensor({}, "]");
  const std::string storage = index("a", size({2, 0})) + storage_info("f", 5, 6) + index("b", "N") +
                              storage_info("g", -1, INT64_MAX) + index("elsewhere", size({})) +
                              storage_info("f", 7, 8, list({text("zstd")}));
  const Columns columns = parse(pickle_of(entries, storage));
  REQUIRE(columns.entries.size() == 3);
  CHECK(columns.entries[0].kind == EntryKind::kTensor);
  CHECK(columns.entries[0].dims == 2);
  CHECK(columns.entries[0].chunk_count == 2);
  CHECK(numbers(columns, columns.entries[0].size, 2) == Numbers{3, 3});
  CHECK(numbers(columns, columns.entries[0].chunks, 8) == Numbers{0, 0, 2, 3, 2, 0, 1, 3});
  CHECK(columns.entries[1].kind == EntryKind::kBytes);
  CHECK(columns.entries[2].dims == 0);
  CHECK(columns.fqns.size() == 4);
  CHECK(columns.fqns[3] == "elsewhere");
  REQUIRE(columns.rows.size() == 3);
  CHECK(columns.rows.length[1] == INT64_MAX);
  CHECK(columns.rows.transforms == std::vector<uint32_t>{0, 0, 1});

  const int64_t offset[] = {2, 0};
  CHECK(columns.find_row(0, offset, 2) == 0);
  CHECK(columns.find_row(0, offset, 1) == HashTable::kNone);
  CHECK(columns.find_row(1, nullptr, StorageRows::kNoOffset) == 1);
  CHECK(columns.find_row(1, nullptr, 0) == HashTable::kNone);
  CHECK(columns.find_row(3, nullptr, 0) == 2);
  CHECK(columns.find_row(3, nullptr, StorageRows::kNoOffset) == HashTable::kNone);
}

TEST_CASE("a list of chunks that entries share is kept once") {
  const std::string chunks = list({chunk({0}, {1})}) + "q\x01";
  const std::string entries = text("a") + tensor({1}, chunks) + text("b") + tensor({1}, "h\x01");
  const Columns columns = parse(pickle_of(entries));
  CHECK(columns.entries[0].chunks == columns.entries[1].chunks);
  CHECK_THROWS_AS(parse(pickle_of(text("a") + tensor({1}, chunks) + text("b") + tensor({1, 1}, "h\x01"))), Unsupported);
}

TEST_CASE("values of inert types are left out of fields, and nowhere else") {
  const std::string set = std::string("\x8f(") + number(1) + "\x90";
  const std::vector<std::string> values = {
      "\x8f",
      set,
      "(" + number(1) + "\x91",
      global("datetime", "date") + text("x") + "\x85R",
      global("collections", "deque") + ")R(" + number(1) + number(2) + "e",
      global("collections", "OrderedDict") + ")R" + text("a") + number(1) + "s",
      global("types", "SimpleNamespace") + ")\x81}" + text("lr") + number(1) + "sb",
      global("numpy", "dtype") + text("f4") + "\x85R(" + number(3) + text("<") + "tb",
      global("uuid", "UUID") + text("any") + "\x85\x81",
      global("builtins", "getattr") + global("torch.distributed.checkpoint.planner", "WriteItemType") + text("SHARD") +
          "\x86R",
      std::string("\x96\x02\0\0\0\0\0\0\0ab", 11),
  };
  const std::string entry = text("a") + object("BytesStorageMetadata");
  for (const std::string& value : values) {
    CAPTURE(value);
    const Columns columns = parse(pickle_of(entry + "}(" + text("more") + value + "ub"));
    REQUIRE(columns.left_out.size() == 1);
    CHECK(columns.left_out[0].name == "more");
    CHECK_THROWS_AS(parse(pickle_of(entry, "", value)), Unsupported);
    CHECK_THROWS_AS(parse(pickle_of(text("a") + value)), Unsupported);
  }
  CHECK_THROWS_AS(parse(pickle_of(entry + "}(" + text("more") + "](" + number(1) + "\x90" + "ub")), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(entry + "}(" + text("more") + "\x8f(" + number(1) + "u" + "ub")), Error);
  CHECK_THROWS_AS(parse(pickle_of(entry + "}(" + text("more") + std::string("\x96\x7f\0\0\0\0\0\0\0", 9))), Error);
}

TEST_CASE("what Python may know is unsupported") {
  const std::string entry = text("a") + object("BytesStorageMetadata");
  CHECK_NOTHROW(parse(pickle_of(entry)));
  const std::vector<std::string> planner_data = {
      global("os", "system"),
      global("os", "system") + text("ls") + "\x85R",
      global("torch", "manual_seed") + number(1) + "\x85R",
      object("TensorStorageMetadata"),
      "\x82\x01",
      text("id") + "Q",
      "Pid\n",
      "(ios\nsystem\n",
      "(" + global("torch", "Size") + "o",
      global("builtins", "getattr") + global("torch", "float32") + text("itemsize") + "\x86R",
      global("builtins", "getattr") + global(kCheckpoint, "Metadata") + text("__init__") + "\x86R",
      global("copyreg", "_reconstructor") + global("builtins", "dict") + global("builtins", "object") + "N\x87R",
      global(kCheckpoint, "Metadata") + "}" + text("version") + "Nsb",
      "}}" + text("a") + "Nsb",
      "\x8f",
      "}" + text("a") + "\x85" + "Ns",
  };
  for (const std::string& opcodes : planner_data) {
    CAPTURE(opcodes);
    CHECK_THROWS_AS(parse(pickle_of(entry, "", opcodes)), Unsupported);
  }
  CHECK_THROWS_AS(parse(pickle_of(entry + entry)), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(number(1) + object("BytesStorageMetadata"))), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(text("a") + text("b"))), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(text("a") + tensor({1}, list({chunk({0, 0}, {1, 1})})))), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(text("a") + tensor({1}, list({text("b")})))), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(text("a") + tensor(Numbers(65, 1), "]"))), Unsupported);
  CHECK_THROWS_AS(parse(pickle_of(entry, index("a", size({0})) + text("b"))), Unsupported);
  const std::string row = index("a", size({0})) + storage_info("f", 0, 1);
  CHECK_THROWS_AS(parse(pickle_of(entry, row + row)), Unsupported);
}

TEST_CASE("the fields of an object are used once") {
  // A dict that became the fields of a chunk is memoized, as pickle does, and then asked for again.
  const std::string fields = "}q\x01(" + text("offsets") + size({0}) + text("sizes") + size({1}) + "u";
  const std::string first = object("ChunkStorageMetadata") + fields + "b";
  CHECK_NOTHROW(parse(pickle_of(text("a") + tensor({1}, list({first})))));
  const std::string again = object("ChunkStorageMetadata") + "h\x01" + "b";
  CHECK_THROWS_AS(parse(pickle_of(text("a") + tensor({1}, list({first, again})))), Unsupported);
  // And a dict of an object whose fields are kept in the memo.
  const std::string meta = "}q\x02(" + text("save_id") + text("x") + "u";
  const std::string planner_data = object("StorageMeta") + meta + "b0h\x02";
  CHECK_THROWS_AS(parse(pickle_of(text("a") + object("BytesStorageMetadata"), "", planner_data)), Unsupported);
}

TEST_CASE("contradictions are corrupt, and the error says where") {
  const std::string entry = text("a") + object("BytesStorageMetadata");
  const std::vector<std::string> opcodes = {
      "X\xff\xff\xff\x7f",
      "\x8d" + std::string(8, '\xff'),
      "\x8e" + std::string(8, '\xff'),
      "\x8b\xff\xff\xff\xff",
      "\x95" + std::string(8, '\xff'),
      "Nr\xff\xff\xff\x7f",
      "h\x05",
      "\xff",
      "t",
      "u",
      "}(Nu",
      "(R",
      "X\x01" + std::string(3, '\0') + "\xff",
      "\x80\x06",
      std::string(1200, ']') + std::string(1199, 'a'),
      "N" + std::string(1200, '\x85'),
  };
  for (const std::string& bad : opcodes) {
    CAPTURE(bad);
    corrupt_at(pickle_of(entry, "", bad));
  }
  CHECK(corrupt_at("\x80\x04\xff") == 2);
  CHECK(corrupt_at("") == 0);
  CHECK(corrupt_at("N.") == 0);
  corrupt_at(pickle_of(text("a") + tensor({-1}, "]")));
  corrupt_at(pickle_of(text("a") + tensor({1}, list({chunk({-1}, {1})}))));
  corrupt_at(pickle_of(text("a") + tensor({1}, list({chunk({INT64_MAX}, {1})}))));
}

TEST_CASE("a pickle that is cut anywhere is corrupt") {
  const std::string storage = index("a", size({0})) + storage_info("f", 0, 1);
  const std::string whole = pickle_of(text("a") + tensor({1}, list({chunk({0}, {1})})), storage);
  CHECK_NOTHROW(parse(whole));
  for (size_t length = 0; length < whole.size(); ++length) corrupt_at(whole.substr(0, length));
}

TEST_CASE("planner data is written as a pickle of its own") {
  const std::string entry = text("a") + object("BytesStorageMetadata");
  const std::string data = "}(" + text("k") + list({number(-1), "\x88", "G" + std::string(8, '\x40')}) + "q\x01" +
                           text("same") + "h\x01" + number(5) + "Nu";
  const std::string expected = "\x80\x04}r" + little_endian(0, 4) + "(" + text("k") + "r" + little_endian(1, 4) + "]r" +
                               little_endian(2, 4) + "(" + number(-1) + "\x88G" + std::string(8, '\x40') + "r" +
                               little_endian(3, 4) + "e" + text("same") + "r" + little_endian(4, 4) + "j" +
                               little_endian(2, 4) + number(5) + "Nu.";
  CHECK(parse(pickle_of(entry, "", data)).planner_data == expected);
}

TEST_CASE("a tuple that doubles with each opcode stays as small as its pickle") {
  std::string data = text("a") + "q\x01";
  for (int i = 0; i < 900; ++i) data += "0h\x01h\x01\x86q\x01";
  // The index is written again and again, which no writer does.
  CHECK_THROWS_AS(parse(pickle_of(text("a") + object("BytesStorageMetadata"), "", data)), Unsupported);
  data = text("a") + "\x94";
  for (uint32_t i = 0; i < 200; ++i) data += "0j" + little_endian(i, 4) + "j" + little_endian(i, 4) + "\x86\x94";
  CHECK(parse(pickle_of(text("a") + object("BytesStorageMetadata"), "", data)).planner_data.size() < 4000);
}
