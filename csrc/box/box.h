// Boxes: rectangular regions of a tensor, and the strided copies that move them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dcp_fast::box {

// One loop of a copy: `size` steps, each moving the source and the destination by so many bytes.
struct Dim {
  int64_t size = 0;
  int64_t source_stride = 0;
  int64_t destination_stride = 0;

  bool operator==(const Dim& other) const {
    return size == other.size && source_stride == other.source_stride && destination_stride == other.destination_stride;
  }
};

// A nest of loops, outermost first, over single bytes: the innermost dimension of every nest made by `collapse` is
// contiguous bytes on both sides. Empty: nothing to copy.
using Loops = std::vector<Dim>;

// Builds the loops for a box: sorted so that the source is walked in ascending order, dimensions of size 1 dropped,
// and neighbours joined where both sides are contiguous. Strides in elements.
Loops collapse(const std::vector<int64_t>& sizes, const std::vector<int64_t>& source_strides,
               const std::vector<int64_t>& destination_strides, int64_t itemsize);

// The same for boxes whose elements change their size on the way: neighbours are joined as elements, and the innermost
// loop is over the bytes of one of them on the source side.
Loops collapse_elements(const std::vector<int64_t>& sizes, const std::vector<int64_t>& source_strides,
                        const std::vector<int64_t>& destination_strides, int64_t source_itemsize,
                        int64_t destination_itemsize);

// Whether no two source positions of sorted loops share a byte. Then a span that is read once serves the whole box.
bool source_is_disjoint(const Loops& loops);

// Bytes from the first to past the last source byte of loops[level..].
int64_t source_span(const Loops& loops, size_t level = 0);

// Bytes from the first to past the last destination byte.
int64_t destination_span(const Loops& loops);

// How many bytes loops[level..] copy.
int64_t volume(const Loops& loops, size_t level = 0);

// Copies between two places in memory.
void copy(std::byte* destination, const std::byte* source, const Dim* loops, size_t depth);

}  // namespace dcp_fast::box
