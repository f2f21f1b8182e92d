#include "planning/boxes.h"

#include <limits>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "box/overlap.h"

namespace dcp_fast::planning {

namespace {

using metadata::Columns;
using metadata::Entry;
using metadata::EntryKind;

// Metadata may be absurd. A count that overflows only has to be large.
void add(int64_t& sum, int64_t value) {
  if (__builtin_add_overflow(sum, value, &sum)) sum = std::numeric_limits<int64_t>::max();
}

int64_t product(const int64_t* sizes, size_t dims) {
  int64_t volume = 1;
  for (size_t dim = 0; dim < dims; ++dim) {
    if (__builtin_mul_overflow(volume, sizes[dim], &volume)) return std::numeric_limits<int64_t>::max();
  }
  return volume;
}

class Search {
 public:
  Search(const Columns& columns, const std::vector<int64_t>& requests) : columns_(columns), requests_(requests) {}

  Boxes run() {
    while (at_ < requests_.size()) {
      const auto entry = static_cast<size_t>(next());
      if (entry >= columns_.entries.size() || columns_.entries[entry].kind != EntryKind::kTensor)
        throw std::invalid_argument("a request is of no tensor");
      find(static_cast<uint32_t>(entry), columns_.entries[entry]);
    }
    return std::move(found_);
  }

 private:
  int64_t next() {
    if (at_ == requests_.size()) throw std::invalid_argument("the requests end within a row");
    return requests_[at_++];
  }

  void find(uint32_t number, const Entry& entry) {
    take_wanted(next(), entry);
    const int64_t* stored = columns_.numbers.data() + entry.chunks;
    stored_.dims = entry.dims;
    stored_.count = entry.chunk_count;
    stored_.values.assign(stored, stored + 2 * size_t{entry.dims} * stored_.count);
    int64_t elements = 0;
    for (size_t chunk = 0; chunk < wanted_.count; ++chunk) add(elements, product(wanted_.sizes(chunk), entry.dims));
    const auto request = static_cast<uint32_t>(found_.entries.size());
    if (append(request, box::find_overlaps(wanted_, stored_)) < elements) found_.uncovered.push_back(request);
    found_.entries.push_back(number);
  }

  void take_wanted(int64_t chunks, const Entry& entry) {
    wanted_.dims = entry.dims;
    if (chunks == kWhole) {
      const int64_t* size = columns_.numbers.data() + entry.size;
      wanted_.count = 1;
      wanted_.values.assign(entry.dims, 0);
      wanted_.values.insert(wanted_.values.end(), size, size + entry.dims);
      return;
    }
    const auto count = static_cast<size_t>(chunks);
    const size_t row = 2 * size_t{entry.dims};
    // Chunks of no dimensions take no room in the row, so their number is limited in another way.
    if (row == 0 ? count > std::numeric_limits<uint32_t>::max() : count > (requests_.size() - at_) / row)
      throw std::invalid_argument("a request is cut");
    const int64_t* wanted = requests_.data() + at_;
    wanted_.count = count;
    wanted_.values.assign(wanted, wanted + row * count);
    at_ += wanted_.values.size();
  }

  // Adds boxes, and returns how many elements they have.
  int64_t append(uint32_t request, const box::Overlaps& overlaps) {
    const auto dims = static_cast<uint32_t>(wanted_.dims);
    int64_t elements = 0;
    const size_t width = 2 + 3 * size_t{dims};
    int64_t before = -1;
    for (size_t at = 0; at < overlaps.rows.size(); at += width) {
      const int64_t* row = overlaps.rows.data() + at;
      // All boxes of a wanted chunk come in a row.
      if (row[0] != before) ++found_.destinations;
      before = row[0];
      found_.boxes.push_back({request, static_cast<uint32_t>(row[0]), static_cast<uint32_t>(row[1]),
                              static_cast<uint32_t>(found_.destinations - 1), dims, found_.numbers.size()});
      found_.numbers.insert(found_.numbers.end(), row + 2, row + width);
      add(elements, product(row + 2 + 2 * size_t{dims}, dims));
    }
    return elements;
  }

  const Columns& columns_;
  const std::vector<int64_t>& requests_;
  size_t at_ = 0;
  box::Chunks wanted_;  // kept for their memory
  box::Chunks stored_;
  Boxes found_;
};

}  // namespace

Boxes find_boxes(const Columns& columns, const std::vector<int64_t>& requests) {
  return Search(columns, requests).run();
}

Records find_records(const Columns& columns, const Boxes& boxes) {
  Records records;
  records.of_box.reserve(boxes.boxes.size());
  std::unordered_map<uint32_t, uint32_t> by_row;
  by_row.reserve(boxes.boxes.size());
  std::unordered_map<uint32_t, uint32_t> numbers_of_files;
  for (size_t i = 0; i < boxes.boxes.size(); ++i) {
    const Box& box = boxes.boxes[i];
    const uint32_t number = boxes.entries[box.request];
    const Entry& entry = columns.entries[number];
    const int64_t* offsets = columns.numbers.data() + entry.chunks + 2 * size_t{box.stored} * entry.dims;
    const uint32_t row = columns.find_row(number, offsets, entry.dims);
    if (row == metadata::HashTable::kNone) {
      records.missing = i;
      return records;
    }
    const auto [known, is_new] = by_row.emplace(row, static_cast<uint32_t>(records.rows.size()));
    if (is_new) {
      records.rows.push_back(row);
      records.requests.push_back(box.request);
      const uint32_t file = columns.rows.file[row];
      const auto [number_of_file, is_new_file] =
          numbers_of_files.emplace(file, static_cast<uint32_t>(records.files.size()));
      if (is_new_file) {
        records.files.push_back(file);
        records.requests_of_files.push_back(box.request);
      }
      records.file.push_back(number_of_file->second);
    }
    records.of_box.push_back(known->second);
  }
  return records;
}

}  // namespace dcp_fast::planning
