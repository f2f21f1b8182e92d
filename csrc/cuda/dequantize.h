// What the kernel of dequantize.cu is told: a box of two dimensions whose stored elements and scales lie on the device.
// nvcc and the host's compiler both read this file, so it stays plain.
#pragma once

#include <stdint.h>  // NOLINT(modernize-deprecated-headers): nvcc needs no C++ library for it

namespace dcp_fast::cuda {

// How elements are stored. The first three are also what destinations hold.
enum class Elements : uint32_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat8E4M3Fn,
  kFloat8E5M2,
  kFloat8E4M3Fnuz,
  kFloat8E5M2Fnuz,
  kFloat4E2M1,  // two in a byte, the lower half first
};

// Threads of a block, and of a warp.
constexpr uint32_t kDequantizeThreads = 256;
constexpr uint32_t kWarpThreads = 32;
// Elements of a row that a warp works at together.
constexpr uint32_t kSegment = 4 * kWarpThreads;

// Addresses are those of the device. Rows and columns are below 2^31, and so are segments of 128 columns in all rows.
struct BoxDequantization {
  uint64_t from;       // rows of stored elements, aligned as these are
  uint64_t scales;     // float32 or E8M0, from that of the block on which the first element lies
  uint64_t to;         // aligned as its elements are
  int64_t row_stride;  // bytes in the destination
  int64_t column_stride;
  uint64_t row_bytes;      // of what is stored
  uint64_t scales_in_row;  // how many
  uint32_t rows;
  uint32_t columns;
  // Sizes of a block, none of which is larger than the box, and where the first element lies in its block.
  uint32_t block_rows;
  uint32_t block_columns;
  uint32_t first_row;
  uint32_t first_column;
  uint32_t first_half;     // 1: the first element of a row is the upper half of its byte
  uint32_t has_exponents;  // whether scales are E8M0
  Elements stored;
  Elements target;       // what a product is rounded to
  Elements destination;  // what that is converted to then
  uint32_t unused;
};

static_assert(sizeof(BoxDequantization) == 104, "written by the host, read by the device");

}  // namespace dcp_fast::cuda
