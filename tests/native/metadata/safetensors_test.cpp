// Headers of safetensors files, under the sanitizers: sound ones become columns, damaged ones an error.
#include "metadata/safetensors.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "exact.h"
#include "metadata/json.h"
#include "metadata/names.h"
#include "metadata/safetensors_columns.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using metadata::Columns;
using metadata::Header;
using metadata::HeaderTensor;
using metadata::Json;

namespace {

constexpr int64_t kSizeBytes = 8;

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape, int64_t begin,
                   int64_t end) {
  return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[)" +
         std::to_string(begin) + ',' + std::to_string(end) + "]}";
}

Header parse(const std::string& text, int64_t payload) {
  const Exact bytes(text);
  const std::string_view view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (!Json::is_text(view)) throw Error(ErrorKind::kCorruptHeader, "no text", "", 0, 0);
  return metadata::parse_header(view, kSizeBytes + static_cast<int64_t>(text.size()) + payload);
}

std::string reason_of(const std::string& text, int64_t payload) {
  try {
    parse(text, payload);
  } catch (const Error& error) {
    CHECK(error.kind == ErrorKind::kCorruptHeader);
    return error.what();
  }
  return "";
}

std::vector<int64_t> numbers(const Columns& columns, uint64_t begin, size_t count) {
  const int64_t* first = columns.numbers.data() + begin;
  return {first, first + count};
}

}  // namespace

TEST_CASE("safetensors: tensors are sorted by name, and their places are those in the file") {
  const std::string text = "{" + tensor("b", "F32", "[2,3]", 0, 24) + "," + tensor("a", "U8", "[]", 24, 25) + "}";
  const Header header = parse(text, 25);
  REQUIRE(header.tensors.size() == 2);
  const int64_t payloads = kSizeBytes + static_cast<int64_t>(text.size());
  CHECK(header.tensors[0].name == "a");
  CHECK(header.tensors[0].begin == payloads + 24);
  CHECK(header.tensors[0].dims == 0);
  CHECK(header.find("b") == &header.tensors[1]);
  CHECK(header.find("b")->end == payloads + 24);
  CHECK(metadata::kDTypeNames.at(header.find("b")->dtype) == "float32");
  CHECK(header.find("c") == nullptr);
}

TEST_CASE("safetensors: pairs of four bits are torch's elements") {
  const Header header = parse("{" + tensor("a", "F4", "[3,8]", 0, 12) + "}", 12);
  const int64_t* chunk = header.numbers.data() + header.tensors[0].numbers;
  CHECK(std::vector<int64_t>(chunk, chunk + 4) == std::vector<int64_t>{0, 0, 3, 4});
}

TEST_CASE("safetensors: chunks of several files are one entry, and the last of equal keys counts") {
  const auto sharded = [](const std::string& offset, const std::string& shape, int64_t bytes) {
    return parse(R"({"__metadata__":{"DCP_SHARDING_INFO":"{\"a\":{\"saved_offsets\":[)" + offset + R"(,0]}}"},)" +
                     tensor("a", "U8", shape, 0, bytes) + "}",
                 bytes);
  };
  const std::vector<Header> headers = {sharded("4", "[2,3]", 6), sharded("0", "[4,3]", 12), sharded("4", "[2,3]", 6)};
  const Columns columns = metadata::collect_headers(headers, {"1", "2", "3"});
  REQUIRE(columns.entries.size() == 1);
  CHECK(columns.entries[0].chunk_count == 3);
  CHECK(numbers(columns, columns.entries[0].size, 2) == std::vector<int64_t>{6, 3});
  CHECK(numbers(columns, columns.entries[0].chunks, 12) == std::vector<int64_t>{4, 0, 2, 3, 0, 0, 4, 3, 4, 0, 2, 3});
  REQUIRE(columns.rows.size() == 2);
  CHECK(columns.files[columns.rows.file[0]] == "3");
  CHECK(columns.files[columns.rows.file[1]] == "2");
  const std::vector<int64_t> offset = {4, 0};
  CHECK(columns.find_row(0, offset.data(), 2) == 0);
}

TEST_CASE("safetensors: reasons") {
  const std::string good = tensor("a", "U8", "[8]", 0, 8);
  CHECK(reason_of("{" + good + "}", 8).empty());
  CHECK(reason_of("{" + good + "}", 7) == "the file is only 68 bytes long");
  CHECK(reason_of("{" + good + "}", 9) == "the file has bytes behind its last payload");
  CHECK(reason_of("{" + good + "," + tensor("b", "U8", "[4]", 9, 13) + "}", 13) ==
        "there is a hole before the tensor's payload");
  CHECK(reason_of("{" + good + "," + tensor("b", "U8", "[4]", 4, 8) + "}", 8) ==
        "the tensor's payload overlaps another one");
  CHECK(reason_of("{" + good + "," + tensor("a", "U8", "[0]", 8, 8) + "}", 8) == "the tensor comes twice");
  CHECK(reason_of("{" + tensor("a", "F8", "[8]", 0, 8) + "}", 8) == "an unknown dtype");
}

TEST_CASE("safetensors: texts of JSON") {
  const std::string text = R"(  ["a\"\\\/\b\f\n\r\tz", "\u0041\u00e9\u20AC\ud83d\ude00", "", "é"]  )";
  Json json(text, 0);
  std::vector<std::string> found;
  json.array([&] { found.push_back(json.string()); });
  json.finish();
  CHECK(found ==
        std::vector<std::string>{"a\"\\/\b\f\n\r\tz", "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", "", "\xc3\xa9"});
  CHECK(Json::is_text("\xed\x9f\xbf"));
  CHECK_FALSE(Json::is_text("\xed\xa0\x80"));
  CHECK_FALSE(Json::is_text("\xed"));
}

TEST_CASE("safetensors: damaged headers are an error or columns that hold together") {
  Random random(14);
  int sound = 0;
  int failed = 0;
  for (int i = 0; i < 40'000; ++i) {
    std::string text = R"({"__metadata__":{"format":"pt","DCP_SHARDING_INFO":"{\"a\":{\"saved_offsets\":[4]},)"
                       R"(\"b\":{\"saved_offsets\":[0,1]}}"},)" +
                       tensor("a", "I16", "[3]", 0, 6) + "," + tensor("b", "F32", "[2,1]", 6, 14) + "}  ";
    for (int64_t left = random.between(0, 2); left > 0; --left) {
      const size_t at = random.below(text.size());
      switch (random.below(5)) {
        case 0:
          text[at] = static_cast<char>(text[at] ^ (1 << random.below(8)));
          break;
        case 1:
          text.erase(at, random.below(4));
          break;
        case 2:
          text.insert(at, random.pick(std::vector<std::string>{"\"", "\\", "{", "}", "[", "]", ",", ":", "0", " "}));
          break;
        case 3:
          text[at] = static_cast<char>('0' + random.below(10));
          break;
        default:
          text.resize(at);
      }
      if (text.empty()) text = " ";
    }
    try {
      const Header header = parse(text, 14);
      const Columns columns = metadata::collect_headers({header, header}, {"x", "y"});
      for (size_t entry = 0; entry < columns.entries.size(); ++entry) {
        const metadata::Entry& known = columns.entries[entry];
        REQUIRE(known.chunks + uint64_t{2} * known.dims * known.chunk_count <= columns.numbers.size());
        REQUIRE(columns.find_row(static_cast<uint32_t>(entry), columns.numbers.data() + known.chunks, known.dims) ==
                entry);
        REQUIRE(columns.rows.offset[entry] + columns.rows.length[entry] <=
                kSizeBytes + static_cast<int64_t>(text.size()) + 14);
      }
      ++sound;
    } catch (const Error& error) {
      REQUIRE(error.kind == ErrorKind::kCorruptHeader);
      REQUIRE(error.offset >= 0);
      ++failed;
    }
  }
  CHECK(sound > 5'000);
  CHECK(failed > 15'000);
}
