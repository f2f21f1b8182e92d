// Steps of conversions: loops over contiguous elements, from one number format to another. Every conversion is one
// step, or two with float32 between them (convert.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/cpu.h"

namespace dcp_fast::copy {

// Converts `count` elements, at any alignment of both sides, which must not overlap.
using Step = void (*)(void* to, const void* from, std::size_t count);

enum class Format : int8_t {
  kInt8,
  kUint8,
  kInt16,
  kInt32,
  kInt64,
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kBFloat16OnesNan,  // as a target: all bits of a NaN are set
  kFloat8E4M3Fn,
  kFloat8E4M3Fnuz,
  kFloat8E5M2,
  kFloat8E5M2Fnuz,
  kBool,
};

// The loop from one format to another, for one of runnable_vectors(). Null if there is none.
Step find_step(Format from, Format to, Vectors vectors);

}  // namespace dcp_fast::copy
