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
    size_t slots = 16;
    while (slots < 2 * rows) slots *= 2;
    if (slots > slots_.size()) slots_.assign(slots, kNone);
  }

  // Has the memory fetched where the row of this hash is looked for first.
  void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]); }

  // The row for which equals(row) holds, or kNone.
  template <typename Equals>
  uint32_t find(uint64_t hash, const Equals& equals) const {
    if (slots_.empty()) return kNone;
    return slots_[slot_of(hash, equals)];
  }

  // Likewise; if there is none, adds `row`. The caller has reserved room.
  template <typename Equals>
  uint32_t find_or_add(uint64_t hash, uint32_t row, const Equals& equals) {
    uint32_t& slot = slots_[slot_of(hash, equals)];
    if (slot != kNone) return slot;
    slot = row;
    return kNone;
  }

 private:
  template <typename Equals>
  size_t slot_of(uint64_t hash, const Equals& equals) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = hash & mask;
    while (slots_[slot] != kNone && !equals(slots_[slot])) slot = (slot + 1) & mask;
    return slot;
  }

  std::vector<uint32_t> slots_;
};

}  // namespace dcp_fast::metadata
