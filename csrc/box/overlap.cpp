#include "box/overlap.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <utility>

namespace dcp_fast::box {

namespace {

// Where a chunk ends. Metadata may be absurd, so the sum is limited.
int64_t end_of(const Chunks& chunks, size_t chunk, size_t dim) {
  int64_t end = 0;
  const bool overflows = __builtin_add_overflow(chunks.offsets(chunk)[dim], chunks.sizes(chunk)[dim], &end);
  return overflows ? std::numeric_limits<int64_t>::max() : end;
}

size_t longest_dim(const Chunks& wanted, const Chunks& stored) {
  size_t longest = 0;
  int64_t longest_extent = 0;
  for (size_t dim = 0; wanted.dims > 1 && dim < wanted.dims; ++dim) {
    int64_t extent = 0;
    for (const Chunks* chunks : {&wanted, &stored}) {
      for (size_t i = 0; i < chunks->count; ++i) {
        const int64_t end = end_of(*chunks, i, dim);
        if (end > extent) extent = end;
      }
    }
    if (extent > longest_extent) {
      longest_extent = extent;
      longest = dim;
    }
  }
  return longest;
}

std::vector<size_t> sorted_by_start(const Chunks& chunks, size_t dim) {
  std::vector<size_t> order(chunks.count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (chunks.dims > 0) {
    const auto before = [&](size_t a, size_t b) { return chunks.offsets(a)[dim] < chunks.offsets(b)[dim]; };
    // Most chunks are sorted, as ranks wrote them in order. To see this costs a tenth of a sort.
    if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
  }
  return order;
}

bool overlap(const Chunks& wanted, size_t w, const Chunks& stored, size_t s) {
  for (size_t dim = 0; dim < wanted.dims; ++dim) {
    if (wanted.offsets(w)[dim] >= end_of(stored, s, dim) || stored.offsets(s)[dim] >= end_of(wanted, w, dim)) {
      return false;
    }
  }
  return true;
}

void append(Overlaps& overlaps, const Chunks& wanted, size_t w, const Chunks& stored, size_t s) {
  std::vector<int64_t>& rows = overlaps.rows;
  rows.push_back(static_cast<int64_t>(w));
  rows.push_back(static_cast<int64_t>(s));
  const int64_t* wanted_offsets = wanted.offsets(w);
  const int64_t* stored_offsets = stored.offsets(s);
  for (size_t dim = 0; dim < wanted.dims; ++dim) {
    rows.push_back(std::max<int64_t>(0, wanted_offsets[dim] - stored_offsets[dim]));
  }
  for (size_t dim = 0; dim < wanted.dims; ++dim) {
    rows.push_back(std::max<int64_t>(0, stored_offsets[dim] - wanted_offsets[dim]));
  }
  for (size_t dim = 0; dim < wanted.dims; ++dim) {
    const int64_t end = std::min(end_of(wanted, w, dim), end_of(stored, s, dim));
    rows.push_back(end - std::max(wanted_offsets[dim], stored_offsets[dim]));
  }
  ++overlaps.count;
}

}  // namespace

Overlaps find_overlaps(const Chunks& wanted, const Chunks& stored) {
  Overlaps overlaps;
  if (wanted.count == 0 || stored.count == 0) return overlaps;
  if (wanted.count == 1 && stored.count == 1) {  // as most tensors have it: nothing to sort
    overlaps.rows.reserve(2 + 3 * wanted.dims);
    if (overlap(wanted, 0, stored, 0)) append(overlaps, wanted, 0, stored, 0);
    return overlaps;
  }
  const size_t dim = longest_dim(wanted, stored);
  const auto bounds = [dim](const Chunks& chunks, size_t i) {
    if (chunks.dims == 0) return std::pair<int64_t, int64_t>(0, 1);
    return std::pair<int64_t, int64_t>(chunks.offsets(i)[dim], end_of(chunks, i, dim));
  };
  const std::vector<size_t> stored_order = sorted_by_start(stored, dim);
  // A line sweeps along the longest dimension; `active` holds the stored chunks that it may cross, by their end.
  std::set<std::pair<int64_t, size_t>> active;
  size_t next = 0;
  for (const size_t w : sorted_by_start(wanted, dim)) {
    const auto [start, end] = bounds(wanted, w);
    while (!active.empty() && active.begin()->first < start) active.erase(active.begin());
    while (next < stored_order.size() && bounds(stored, stored_order[next]).first < end) {
      const int64_t stored_end = bounds(stored, stored_order[next]).second;
      if (stored_end >= start) active.emplace(stored_end, stored_order[next]);  // else no later chunk meets it either
      ++next;
    }
    for (const auto& [stored_end, s] : active) {
      if (overlap(wanted, w, stored, s)) append(overlaps, wanted, w, stored, s);
    }
  }
  return overlaps;
}

}  // namespace dcp_fast::box
