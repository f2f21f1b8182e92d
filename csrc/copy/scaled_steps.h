// Loops that decode, scale and round elements at once, for the pairs of formats that models have most.
#pragma once

#include <cstddef>
#include <cstdint>

#include "checkpoint/dtype.h"

namespace dcp_fast::copy {

// Brings `count` elements of one block to their target, times a scale that can_step(scale) allows. Both sides may lie
// at any address.
using ScaledStep = void (*)(void* to, const std::byte* from, int64_t count, float scale);

// Brings whole blocks of MXFP4, of 32 elements each, to their target.
using BlocksStep = void (*)(void* to, const std::byte* from, const std::byte* exponents, int64_t blocks);
inline constexpr int64_t kMxfp4Block = 32;

enum class StepTarget : int8_t { kFloat32, kBFloat16, kFloat16 };

// Of FP8. Null for other dtypes, and where the processor has no instructions for that.
ScaledStep find_scaled_step(checkpoint::DType stored, StepTarget target);
BlocksStep find_mxfp4_step(StepTarget target);

// Whether a scale is a number that a ScaledStep can multiply with, as all but extreme ones are.
bool can_step(float scale);

}  // namespace dcp_fast::copy
