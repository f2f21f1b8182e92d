// Which boxes of which stored chunks does a rank need, of all its tensors at once: a load plan as columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "metadata/columns.h"

namespace dcp_fast::planning {

// What torch keeps as a ReadItem.
struct Box {
  uint32_t request;      // by its number
  uint32_t wanted;       // among the request's chunks
  uint32_t stored;       // among the chunks of the request's entry
  uint32_t destination;  // the number of its wanted chunk among those that anything is read for
  uint32_t dims;
  uint64_t numbers;  // where in `numbers` offsets in the stored chunk, offsets in the wanted one, and lengths are
};

struct Boxes {
  std::vector<uint32_t> entries;    // of each request
  std::vector<uint32_t> uncovered;  // requests of which the checkpoint lacks some elements
  std::vector<Box> boxes;           // by request, then as box::find_overlaps orders them
  std::vector<int64_t> numbers;
  size_t destinations = 0;

  const int64_t* storage_offsets(const Box& box) const { return numbers.data() + box.numbers; }
  const int64_t* destination_offsets(const Box& box) const { return storage_offsets(box) + box.dims; }
  const int64_t* lengths(const Box& box) const { return destination_offsets(box) + box.dims; }
};

// Stands for the number of wanted chunks, and for the chunks, of a tensor that is wanted whole.
inline constexpr int64_t kWhole = -1;

// `requests` has a row for each tensor: its entry, the number of wanted chunks, their offsets and sizes one by one; or
// its entry and kWhole. Throws std::invalid_argument for rows that are cut, or of an entry that is no tensor.
Boxes find_boxes(const metadata::Columns& columns, const std::vector<int64_t>& requests);

// The stored tensors that boxes are parts of, each once, in the order of their first boxes.
struct Records {
  std::vector<uint32_t> of_box;
  std::vector<uint32_t> rows;               // of storage_data, for each record
  std::vector<uint32_t> files;              // that hold records, as numbered in the columns
  std::vector<uint32_t> file;               // of each record: its number in `files`
  std::vector<uint32_t> requests;           // of the first box of each record
  std::vector<uint32_t> requests_of_files;  // of the first box of each file
  std::optional<size_t> missing;  // the first box whose chunk storage_data lacks; then nothing else is complete
};

Records find_records(const metadata::Columns& columns, const Boxes& boxes);

}  // namespace dcp_fast::planning
