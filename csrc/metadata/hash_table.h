// A set of row numbers, found by a hash of what the rows hold. The rows themselves lie elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dcp_fast::metadata {

class HashTable {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  void reserve(size_t rows) {
    size_t cells = 16;
    while (cells < 2 * rows) cells *= 2;
    if (cells > cells_.size()) cells_.assign(cells, kNone);
  }

  // Has the memory fetched where the row of this hash is looked for first.
  void prefetch(uint64_t hash) const { __builtin_prefetch(&cells_[hash & (cells_.size() - 1)]); }

  // The row for which equals(row) holds, or kNone.
  template <typename Equals>
  uint32_t find(uint64_t hash, const Equals& equals) const {
    if (cells_.empty()) return kNone;
    return cells_[cell_of(hash, equals)];
  }

  // Likewise; if there is none, adds `row`. The caller has reserved room.
  template <typename Equals>
  uint32_t find_or_add(uint64_t hash, uint32_t row, const Equals& equals) {
    uint32_t& cell = cells_[cell_of(hash, equals)];
    if (cell != kNone) return cell;
    cell = row;
    return kNone;
  }

 private:
  template <typename Equals>
  size_t cell_of(uint64_t hash, const Equals& equals) const {
    const size_t mask = cells_.size() - 1;
    size_t cell = hash & mask;
    while (cells_[cell] != kNone && !equals(cells_[cell])) cell = (cell + 1) & mask;
    return cell;
  }

  std::vector<uint32_t> cells_;
};

}  // namespace dcp_fast::metadata
