// What the kernel of dequantize.cu is told about a box, and which formats it knows.
#pragma once

#include <cstdint>
#include <optional>

#include "checkpoint/dtype.h"
#include "copy/dequantize.h"
#include "cuda/dequantize.h"

namespace dcp_fast::cuda {

// nullopt for a format that the kernel does not know. `stored` counts for Quantization::kElements alone.
std::optional<Elements> stored_elements(copy::Quantization quantization, checkpoint::DType stored);
std::optional<Elements> resulting_elements(checkpoint::DType dtype);

struct DequantizedFormats {
  Elements stored;
  Elements target;
  Elements destination;
  copy::Scales scales;
};

// Addresses of the box are those of the device. Throws std::invalid_argument for a box that is empty or too large.
BoxDequantization describe(const DequantizedFormats& formats, const copy::QuantizedBox& box);

// How many thread blocks a box is worth.
uint32_t thread_blocks(const BoxDequantization& box);

}  // namespace dcp_fast::cuda
