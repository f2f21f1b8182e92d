// Boxes cut at positions of the source: what of a box lies within an interval of bytes.
//
// All loops here are sorted and disjoint, so that the bytes of a box have one ascending order in the source. That order
// is what both ends of an exchange pack and unpack by.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "box/box.h"

namespace dcp_fast::box {

// How many bytes of a box lie before `position`, which counts from the box's first source byte.
int64_t volume_before(const Dim* loops, size_t depth, int64_t position);

// A part of a box that is a box itself.
struct Part {
  Loops loops;
  int64_t source = 0;       // of its first byte, from the first one of the box
  int64_t destination = 0;  // likewise
  int64_t packed = 0;       // how many bytes of the interval come before it
};

// What of a box lies in [begin, end), in ascending order. At most two parts for each loop. Positions count from the
// box's first source byte.
std::vector<Part> cut(const Dim* loops, size_t depth, int64_t begin, int64_t end);

}  // namespace dcp_fast::box
