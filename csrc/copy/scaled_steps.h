// Loops that decode, scale and round elements at once, for the pairs of formats that models have most.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcp_fast::copy {

// Brings `count` elements of one block to their target, times a scale that can_step(scale) allows. Both sides may lie
// at any address.
using ScaledStep = void (*)(void* to, const std::byte* from, int64_t count, float scale);

// Brings whole blocks of MXFP4, of 32 elements each, to their target.
using BlocksStep = void (*)(void* to, const std::byte* from, const std::byte* exponents, int64_t blocks);
inline constexpr int64_t kMxfp4Block = 32;

// Of E4M3, and of MXFP4, to float32 or bfloat16. Null where the processor has no instructions for that.
ScaledStep find_e4m3_step(bool to_bfloat16);
BlocksStep find_mxfp4_step(bool to_bfloat16);

// Whether a scale is a number that a ScaledStep can multiply with, as all but extreme ones are.
bool can_step(float scale);

}  // namespace dcp_fast::copy
