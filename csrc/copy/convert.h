// Conversions of elements on their way from one place in memory to another. The results are those of torch's `copy_` on
// the CPU, bit for bit, but for NaNs: see find_conversion.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "box/box.h"
#include "checkpoint/dtype.h"
#include "copy/cpu.h"
#include "copy/steps.h"

namespace dcp_fast::copy {

// One pair of dtypes.
struct Conversion {
  Step first = nullptr;
  Step second = nullptr;   // where there is one, float32 is between the two
  int32_t from_bytes = 0;  // of an element
  int32_t to_bytes = 0;
  bool same_dtype = false;  // elements get the bytes that torch has for their values: of bool 0 and 1
  Vectors vectors = Vectors::kNone;
};

// How to convert between two dtypes, with the best instructions of this processor or with given ones. nullopt if torch
// must: the pair is rare, or what torch makes of some values is not defined, or depends on its version. nullopt also
// for one dtype twice, but for bool.
//
// `inner_contiguous`: whether the innermost loop of torch's own copy would find elements side by side, on both sides.
// On processors with AVX2 torch then sets all bits of a NaN that is converted from float32 or float64 to bfloat16.
// Otherwise it sets those of BFloat16::kNan. There are tails of torch's loops that do as the other kind of loop does,
// so NaNs may differ from torch's there. They may also where torch is told to use other instructions than the best.
std::optional<Conversion> find_conversion(checkpoint::DType from, checkpoint::DType to, bool inner_contiguous);
std::optional<Conversion> find_conversion(checkpoint::DType from, checkpoint::DType to, bool inner_contiguous,
                                          Vectors vectors);

// Converts a box. `loops` end with one over the bytes of an element on the source side, as box::collapse makes them for
// conversions. A large box is written past the cache.
void convert_box(const Conversion& conversion, std::byte* to, const std::byte* from, const box::Dim* loops,
                 std::size_t depth);

}  // namespace dcp_fast::copy
