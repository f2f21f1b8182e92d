// The kernel that dequantizes a box: its elements, times the scales of their blocks, become what the destination holds.
// The arithmetic is that of copy/dequantize.h. generate_ptx.py compiles this file to dequantize.ptx, which is what
// ships; see there for what that asks of it.
#include "copy/numbers.h"
#include "cuda/dequantize.h"

using namespace dcp_fast::copy;
using dcp_fast::cuda::BoxDequantization;
using dcp_fast::cuda::Elements;
using dcp_fast::cuda::kDequantizeThreads;
using dcp_fast::cuda::kSegment;
using dcp_fast::cuda::kWarpThreads;

namespace {

template <typename T>
__device__ T load(uint64_t address, uint64_t index) {
  return __ldg(reinterpret_cast<const T*>(address) + index);
}

template <typename T>
__device__ void store(uint64_t address, T value) {
  *reinterpret_cast<T*>(address) = value;
}

// A stored element, which may be a half of the byte that is read.
__device__ uint32_t load_element(const BoxDequantization& box, uint64_t row, uint32_t column) {
  switch (box.stored) {
    case Elements::kFloat32:
      return load<uint32_t>(row, column);
    case Elements::kFloat4E2M1: {
      const uint32_t half = column + box.first_half;
      return static_cast<uint32_t>(load<uint8_t>(row, half / 2)) >> (half % 2 * 4) & 15;
    }
    default:
      return load<uint8_t>(row, column);
  }
}

__device__ float decode(Elements stored, uint32_t bits) {
  const auto byte = static_cast<uint8_t>(bits);
  switch (stored) {
    case Elements::kFloat8E4M3Fn:
      return float_of(Float8E4M3Fn::to_float32(byte));
    case Elements::kFloat8E5M2:
      return float_of(Float8E5M2::to_float32(byte));
    case Elements::kFloat8E4M3Fnuz:
      return float_of(Float8E4M3Fnuz::to_float32(byte));
    case Elements::kFloat8E5M2Fnuz:
      return float_of(Float8E5M2Fnuz::to_float32(byte));
    case Elements::kFloat4E2M1:
      return float_of(Float4E2M1::to_float32(byte));
    default:
      return float_of(bits);
  }
}

__device__ float load_scale(const BoxDequantization& box, uint64_t index) {
  const uint32_t bits =
      box.has_exponents ? Float8E8M0::to_float32(load<uint8_t>(box.scales, index)) : load<uint32_t>(box.scales, index);
  return float_of(bits);
}

// Bits of a float32 in another format.
__device__ uint32_t round_to(Elements format, uint32_t bits) {
  if (format == Elements::kBFloat16) return BFloat16::from_float32(bits);
  return format == Elements::kFloat16 ? Float16::from_float32(bits) : bits;
}

__device__ uint32_t to_float32(Elements format, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  if (format == Elements::kBFloat16) return BFloat16::to_float32(half);
  return format == Elements::kFloat16 ? Float16::to_float32(half) : bits;
}

__device__ void place(const BoxDequantization& box, uint64_t to, float product) {
  uint32_t bits = round_to(box.target, bits_of(product));
  if (box.target != box.destination) bits = round_to(box.destination, to_float32(box.target, bits));
  if (box.destination == Elements::kFloat32) {
    store(to, bits);
  } else {
    store(to, static_cast<uint16_t>(bits));
  }
}

}  // namespace

// A warp takes one segment of a row after another. Its threads are as many as a multiprocessor can hold, and hide how
// long memory takes.
extern "C" __global__ void __launch_bounds__(kDequantizeThreads) dcp_fast_dequantize(const BoxDequantization box) {
  const uint32_t segments = (box.columns + kSegment - 1) / kSegment;
  const uint32_t warps = kDequantizeThreads / kWarpThreads;
  for (uint32_t segment = blockIdx.x * warps + threadIdx.x / kWarpThreads; segment < box.rows * segments;
       segment += gridDim.x * warps) {
    const uint32_t row = segment / segments;
    const uint32_t begin = (segment - row * segments) * kSegment;
    const uint32_t end = min(begin + kSegment, box.columns);
    const uint64_t from = box.from + row * box.row_bytes;
    const uint64_t scales = (box.first_row + row) / box.block_rows * box.scales_in_row;
    const uint64_t to = box.to + row * static_cast<uint64_t>(box.row_stride);
#pragma unroll 1
    for (uint32_t column = begin + threadIdx.x % kWarpThreads; column < end; column += kWarpThreads) {
      const float scale = load_scale(box, scales + (box.first_column + column) / box.block_columns);
      const float product = decode(box.stored, load_element(box, from, column)) * scale;
      place(box, to + column * static_cast<uint64_t>(box.column_stride), product);
    }
  }
}
