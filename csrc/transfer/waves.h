// Destinations may share memory: tied parameters, views of one buffer, overlapping stored chunks. torch copies one item
// after another, so the last one wins. Here items run in any order, except that an item waits, in a later wave, for
// every earlier item that writes one of its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dcp_fast::transfer {

// What an item writes, in torch's order of items.
struct Write {
  uint64_t begin = 0;  // addresses: the first byte and past the last one; equal if there is none
  uint64_t end = 0;
  size_t destination = 0;            // items of one destination are told apart by their boxes
  const int64_t* offsets = nullptr;  // of the box in its destination
  const int64_t* sizes = nullptr;
  size_t dims = 0;
};

// How much may be spent, for each write, on telling which boxes conflict. Thousands of aliases of one buffer would
// otherwise take quadratic time and memory; tiles of a tensor compare with about the root of their number.
struct ConflictLimits {
  size_t comparisons = 512;
  size_t conflicts = 32;
};

// The wave of each write, counted from 0. Past the limits writes also wait for those whose address ranges, but not
// boxes, overlap theirs.
std::vector<int32_t> assign_waves(const std::vector<Write>& writes, const ConflictLimits& limits = {});

}  // namespace dcp_fast::transfer
