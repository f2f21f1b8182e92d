#include "box/box.h"

#include <algorithm>
#include <cstring>

#include "copy/copy.h"

namespace dcp_fast::box {

namespace {

// The inner loop for elements of a size that the compiler knows: the call to memcpy becomes one load and one store.
template <size_t kBytes>
void copy_elements(std::byte* destination, const std::byte* source, const Dim& dim) {
  for (int64_t i = 0; i < dim.size; ++i) {
    std::memcpy(destination + i * dim.destination_stride, source + i * dim.source_stride, kBytes);
  }
}

void copy_runs(std::byte* destination, const std::byte* source, const Dim& dim, int64_t bytes) {
  switch (bytes) {
    case 1:
      return copy_elements<1>(destination, source, dim);
    case 2:
      return copy_elements<2>(destination, source, dim);
    case 4:
      return copy_elements<4>(destination, source, dim);
    case 8:
      return copy_elements<8>(destination, source, dim);
    case 16:
      return copy_elements<16>(destination, source, dim);
    default:
      copy::copy_rows(destination, dim.destination_stride, source, dim.source_stride, static_cast<size_t>(dim.size),
                      static_cast<size_t>(bytes));
  }
}

// Where two writes are this many bytes apart, a walk along columns misses the cache on every element.
constexpr int64_t kTileStride = 256;
constexpr int64_t kTile = 32;

// A transposition of elements in square tiles, so that both sides stay in the cache.
void copy_tiled(std::byte* destination, const std::byte* source, const Dim& outer, const Dim& inner, int64_t bytes) {
  for (int64_t i = 0; i < outer.size; i += kTile) {
    const int64_t rows = std::min(kTile, outer.size - i);
    for (int64_t j = 0; j < inner.size; j += kTile) {
      const Dim dim{rows, outer.source_stride, outer.destination_stride};
      const int64_t columns = std::min(kTile, inner.size - j);
      for (int64_t k = j; k < j + columns; ++k) {
        copy_runs(destination + i * outer.destination_stride + k * inner.destination_stride,
                  source + i * outer.source_stride + k * inner.source_stride, dim, bytes);
      }
    }
  }
}

// One loop for each dimension that has more than one element, and one over the bytes of an element.
Loops sorted_loops(const std::vector<int64_t>& sizes, const std::vector<int64_t>& source_strides,
                   const std::vector<int64_t>& destination_strides, int64_t source_itemsize,
                   int64_t destination_itemsize) {
  // This comes first: the strides of an empty tensor may be anything, and too large to compute with.
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return {};
  // Every item of a load comes by here several times, so there is one allocation only.
  Loops loops;
  loops.reserve(sizes.size() + 1);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] <= 1) continue;
    const Dim dim{sizes[i], source_strides[i] * source_itemsize, destination_strides[i] * destination_itemsize};
    const auto place = std::upper_bound(loops.begin(), loops.end(), dim,
                                        [](const Dim& a, const Dim& b) { return a.source_stride > b.source_stride; });
    loops.insert(place, dim);
  }
  loops.push_back({source_itemsize, 1, 1});
  return loops;
}

// Joins each loop with the next one where both sides go on without a gap.
void join_neighbours(Loops& loops) {
  // From the innermost loop outwards; those from `joined` on are done.
  size_t joined = loops.size() - 1;
  for (size_t i = joined; i-- > 0;) {
    Dim& inner = loops[joined];
    if (loops[i].source_stride == inner.size * inner.source_stride &&
        loops[i].destination_stride == inner.size * inner.destination_stride) {
      inner.size *= loops[i].size;
    } else {
      loops[--joined] = loops[i];
    }
  }
  loops.erase(loops.begin(), loops.begin() + static_cast<std::ptrdiff_t>(joined));
}

}  // namespace

Loops collapse(const std::vector<int64_t>& sizes, const std::vector<int64_t>& source_strides,
               const std::vector<int64_t>& destination_strides, int64_t itemsize) {
  Loops loops = sorted_loops(sizes, source_strides, destination_strides, itemsize, itemsize);
  if (loops.empty()) return loops;
  join_neighbours(loops);
  return loops;
}

Loops collapse_elements(const std::vector<int64_t>& sizes, const std::vector<int64_t>& source_strides,
                        const std::vector<int64_t>& destination_strides, int64_t source_itemsize,
                        int64_t destination_itemsize) {
  Loops loops = sorted_loops(sizes, source_strides, destination_strides, source_itemsize, destination_itemsize);
  if (loops.empty()) return loops;
  const Dim element = loops.back();
  loops.pop_back();
  if (!loops.empty()) join_neighbours(loops);
  loops.push_back(element);
  return loops;
}

bool source_is_disjoint(const Loops& loops) {
  for (size_t level = 0; level + 1 < loops.size(); ++level) {
    if (loops[level].source_stride < source_span(loops, level + 1)) return false;
  }
  return true;
}

int64_t source_span(const Loops& loops, size_t level) {
  if (loops.empty()) return 0;
  int64_t last = 0;
  for (size_t i = level; i < loops.size(); ++i) last += (loops[i].size - 1) * loops[i].source_stride;
  return last + 1;
}

int64_t destination_span(const Loops& loops) {
  if (loops.empty()) return 0;
  int64_t last = 0;
  for (const Dim& loop : loops) last += (loop.size - 1) * loop.destination_stride;
  return last + 1;
}

int64_t volume(const Loops& loops, size_t level) {
  if (loops.empty()) return 0;
  int64_t bytes = 1;
  for (size_t i = level; i < loops.size(); ++i) bytes *= loops[i].size;
  return bytes;
}

void copy(std::byte* destination, const std::byte* source, const Dim* loops, size_t depth) {
  if (depth == 0) return;
  const Dim& outer = loops[0];
  if (depth == 1) {
    copy::copy_bytes(destination, source, static_cast<size_t>(outer.size));
    return;
  }
  if (depth == 2) return copy_runs(destination, source, outer, loops[1].size);
  if (depth == 3 && loops[1].destination_stride >= kTileStride && loops[2].size <= 16) {
    return copy_tiled(destination, source, outer, loops[1], loops[2].size);
  }
  for (int64_t i = 0; i < outer.size; ++i) {
    copy(destination + i * outer.destination_stride, source + i * outer.source_stride, loops + 1, depth - 1);
  }
}

}  // namespace dcp_fast::box
