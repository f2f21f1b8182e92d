#include "planning/boxes.h"

#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "doctest/doctest.h"

using namespace dcp_fast;
using planning::Box;
using planning::Boxes;
using planning::Records;
using Ints = std::vector<int64_t>;

namespace {

constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

// Tensors "0", "1", ... of chunks of equal dimensions, and bytes entries.
class Metadata {
 public:
  // Each chunk is its offsets and sizes.
  void tensor(uint32_t dims, const std::vector<Ints>& chunks) {
    metadata::Entry entry;
    entry.kind = metadata::EntryKind::kTensor;
    entry.dims = dims;
    entry.chunk_count = static_cast<uint32_t>(chunks.size());
    entry.size = columns.numbers.size();
    for (uint32_t dim = 0; dim < dims; ++dim) columns.numbers.push_back(10 + dim);
    entry.chunks = columns.numbers.size();
    for (const Ints& chunk : chunks) columns.numbers.insert(columns.numbers.end(), chunk.begin(), chunk.end());
    add(entry);
  }
  void bytes() { add({}); }

  // Where a chunk is stored.
  void row(uint32_t entry, uint32_t chunk, uint32_t file) {
    const metadata::Entry& tensor = columns.entries[entry];
    metadata::StorageRows& rows = columns.rows;
    rows.fqn.push_back(entry);
    rows.dims.push_back(tensor.dims);
    rows.chunk_offset.push_back(tensor.chunks + 2 * uint64_t{chunk} * tensor.dims);
    rows.index.push_back(chunk);
    rows.file.push_back(file);
    rows.offset.push_back(0);
    rows.length.push_back(1);
  }

  metadata::Columns columns;

 private:
  void add(const metadata::Entry& entry) {
    columns.fqns.add(std::to_string(columns.entries.size()));
    columns.entries.push_back(entry);
  }
};

Ints numbers_of(const Boxes& boxes, const Box& box) {
  const int64_t* begin = boxes.storage_offsets(box);
  return {begin, begin + 3 * box.dims};
}

}  // namespace

TEST_CASE("boxes of several tensors and chunks, with the destinations that they share") {
  Metadata metadata;
  metadata.tensor(1, {{0, 4}, {4, 4}});
  metadata.bytes();
  metadata.tensor(2, {{0, 0, 2, 2}});
  metadata.tensor(0, {{}});
  const Boxes boxes =
      planning::find_boxes(metadata.columns, {2, 1, 1, 0, 1, 2, /**/ 3, 1, /**/ 0, 2, 5, 3, 1, 4, /**/ 0, 0});
  CHECK(boxes.entries == std::vector<uint32_t>{2, 3, 0, 0});
  CHECK(boxes.uncovered.empty());
  REQUIRE(boxes.boxes.size() == 5);
  const std::vector<std::vector<uint32_t>> expected = {
      {0, 0, 0, 0}, {1, 0, 0, 1}, {2, 1, 0, 2}, {2, 1, 1, 2}, {2, 0, 1, 3}};
  const std::vector<Ints> numbers = {{1, 0, 0, 0, 1, 2}, {}, {1, 0, 3}, {0, 3, 1}, {1, 0, 3}};
  for (size_t i = 0; i < expected.size(); ++i) {
    const Box& box = boxes.boxes[i];
    CHECK(std::vector<uint32_t>{box.request, box.wanted, box.stored, box.destination} == expected[i]);
    CHECK(numbers_of(boxes, box) == numbers[i]);
  }
  CHECK(boxes.destinations == 4);
  CHECK(planning::find_boxes(metadata.columns, {3, 5}).destinations == 5);
  CHECK(planning::find_boxes(metadata.columns, {}).boxes.empty());
}

TEST_CASE("a tensor that is wanted whole is one chunk of its size") {
  Metadata metadata;
  metadata.tensor(2, {{0, 0, 4, 11}, {4, 0, 6, 11}});
  metadata.tensor(0, {{}});
  metadata.tensor(1, {{0, 9}});
  const auto whole = planning::kWhole;
  const Boxes boxes = planning::find_boxes(metadata.columns, {0, whole, /**/ 1, whole, /**/ 2, whole});
  const Boxes same = planning::find_boxes(metadata.columns, {0, 1, 0, 0, 10, 11, /**/ 1, 1, /**/ 2, 1, 0, 10});
  REQUIRE(boxes.boxes.size() == 4);
  REQUIRE(same.boxes.size() == 4);
  for (size_t i = 0; i < 4; ++i) CHECK(numbers_of(boxes, boxes.boxes[i]) == numbers_of(same, same.boxes[i]));
  CHECK(numbers_of(boxes, boxes.boxes[1]) == Ints{0, 0, 4, 0, 6, 11});
  CHECK(boxes.entries == same.entries);
  CHECK(boxes.destinations == 3);
  CHECK(boxes.uncovered == std::vector<uint32_t>{2});
}

TEST_CASE("tensors of which the checkpoint lacks something are told, absurd sizes included") {
  Metadata metadata;
  metadata.tensor(1, {{0, 4}, {6, 4}});
  metadata.tensor(2, {{0, 0, kMax, kMax}});
  metadata.tensor(1, {});
  const Boxes boxes = planning::find_boxes(
      metadata.columns, {0, 1, 0, 10, /**/ 0, 1, 6, 4, /**/ 1, 1, 0, 0, kMax, kMax, /**/ 2, 1, 0, 1, /**/ 2, 1, 0, 0});
  CHECK(boxes.uncovered == std::vector<uint32_t>{0, 3});
}

TEST_CASE("requests that are cut, or of no tensor, are refused") {
  Metadata metadata;
  metadata.tensor(1, {{0, 4}});
  metadata.bytes();
  for (const Ints& requests : std::vector<Ints>{
           {0}, {0, 1}, {0, 1, 0}, {0, 2, 0, 4}, {0, -2, 0, 4}, {0, kMax, 0, 4}, {1, 0}, {2, 0}, {-1, 0}}) {
    CHECK_THROWS_AS(planning::find_boxes(metadata.columns, requests), std::invalid_argument);
  }
}

TEST_CASE("records and files are numbered by their first boxes, each once") {
  Metadata metadata;
  metadata.tensor(1, {{0, 4}, {4, 4}});
  metadata.tensor(1, {{0, 4}});
  metadata.row(1, 0, 2);
  metadata.row(0, 1, 1);
  metadata.row(0, 0, 2);
  const Boxes boxes = planning::find_boxes(metadata.columns, {0, 2, 0, 6, 6, 2, /**/ 1, 1, 0, 4, /**/ 0, 1, 0, 1});
  REQUIRE(metadata.columns.make_row_table());
  const Records records = planning::find_records(metadata.columns, boxes);
  CHECK_FALSE(records.missing.has_value());
  CHECK(records.of_box == std::vector<uint32_t>{0, 1, 1, 2, 0});
  CHECK(records.rows == std::vector<uint32_t>{2, 1, 0});
  CHECK(records.requests == std::vector<uint32_t>{0, 0, 1});
  CHECK(records.files == std::vector<uint32_t>{2, 1});
  CHECK(records.requests_of_files == std::vector<uint32_t>{0, 0});
  CHECK(records.file == std::vector<uint32_t>{0, 1, 0});
}

TEST_CASE("a box whose chunk is stored nowhere is told") {
  Metadata metadata;
  metadata.tensor(1, {{0, 4}, {4, 4}});
  metadata.row(0, 0, 0);
  const Boxes boxes = planning::find_boxes(metadata.columns, {0, 1, 0, 8});
  REQUIRE(metadata.columns.make_row_table());
  CHECK(planning::find_records(metadata.columns, boxes).missing == 1);
}
