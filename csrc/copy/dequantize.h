// Quantized tensors: stored elements of few bits, each block of which has a scale of its own.
//
// The arithmetic is that of torch's QuantizedHuggingFaceStorageReader: an element becomes a float32, which is
// multiplied by the scale of its block as a float32, and rounded to the target dtype. What the destination holds is
// converted from that dtype, as `copy_` converts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "checkpoint/dtype.h"
#include "copy/convert.h"
#include "copy/scaled_steps.h"

namespace dcp_fast::copy {

// How elements are stored.
enum class Quantization : int8_t {
  kElements,  // as elements of a dtype of torch
  kMxfp4,     // E2M1 numbers, two in a byte, the lower half first (OCP Microscaling Formats, 5.3.3)
};

// How the scales of blocks are stored.
enum class Scales : int8_t {
  kFloat32,
  kE8M0,  // the exponent of a power of two (the same, 5.4.1)
};

constexpr int64_t bytes_of(Scales scales) { return scales == Scales::kE8M0 ? 1 : sizeof(float); }

struct Dequantization {
  Quantization quantization = Quantization::kElements;
  Scales scales = Scales::kFloat32;
  int32_t from_bytes = 1;            // of a stored element, if it is one
  int32_t target_bytes = 0;          // of an element of the target dtype
  int32_t to_bytes = 0;              // of an element of the destination
  std::optional<Conversion> decode;  // to float32; none if that is what is stored, and for MXFP4
  std::optional<Conversion> round;   // to the target dtype; none if that is float32
  std::optional<Conversion> place;   // to the dtype of the destination; none if that is the target dtype
  ScaledStep step = nullptr;         // does the first two and the multiplication at once, if there is one
  BlocksStep blocks_step = nullptr;  // the same for MXFP4
};

// nullopt if there is a dtype that find_conversion does not know in such a place. `stored` counts for kElements alone.
std::optional<Dequantization> find_dequantization(Quantization quantization, Scales scales, checkpoint::DType stored,
                                                  checkpoint::DType target, checkpoint::DType destination,
                                                  bool inner_contiguous);

// A box of two dimensions, in memory. Strides in bytes, but for those of scales.
struct QuantizedBox {
  int64_t rows = 0;
  int64_t columns = 0;
  // What is stored: rows of elements. Those of MXFP4 begin with a block, so before the first element that is wanted.
  const std::byte* from = nullptr;
  int64_t from_stride = 0;
  // The scales, from that of the block on which the first element lies.
  const std::byte* scales = nullptr;
  int64_t scales_stride = 0;
  // Sizes of a block, and where the first element lies in its block.
  int64_t block_rows = 1;
  int64_t block_columns = 1;
  int64_t first_row = 0;
  int64_t first_column = 0;
  std::byte* to = nullptr;
  int64_t to_row_stride = 0;
  int64_t to_column_stride = 0;
};

// A large box is written past the cache.
void dequantize(const Dequantization& how, const QuantizedBox& box);

}  // namespace dcp_fast::copy
