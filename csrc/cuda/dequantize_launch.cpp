#include "cuda/dequantize_launch.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace dcp_fast::cuda {

namespace {

struct NamedElements {
  std::string_view dtype;
  Elements elements;
  bool is_result;
};

constexpr std::array<NamedElements, 7> kNamedElements{{
    {"float32", Elements::kFloat32, true},
    {"bfloat16", Elements::kBFloat16, true},
    {"float16", Elements::kFloat16, true},
    {"float8_e4m3fn", Elements::kFloat8E4M3Fn, false},
    {"float8_e5m2", Elements::kFloat8E5M2, false},
    {"float8_e4m3fnuz", Elements::kFloat8E4M3Fnuz, false},
    {"float8_e5m2fnuz", Elements::kFloat8E5M2Fnuz, false},
}};

// Enough to fill any device several times over.
constexpr uint32_t kMostBlocks = 4096;

std::optional<NamedElements> find(checkpoint::DType dtype) {
  if (dtype == checkpoint::kUnknownDType) return std::nullopt;
  const std::string_view name = checkpoint::info(dtype).name;
  for (const NamedElements& named : kNamedElements) {
    if (named.dtype == name) return named;
  }
  return std::nullopt;
}

uint64_t segments_in_row(uint64_t columns) { return (columns + kSegment - 1) / kSegment; }

uint32_t narrow(int64_t value) { return static_cast<uint32_t>(value); }

}  // namespace

std::optional<Elements> stored_elements(copy::Quantization quantization, checkpoint::DType stored) {
  if (quantization == copy::Quantization::kMxfp4) return Elements::kFloat4E2M1;
  const auto named = find(stored);
  // Those of 16 bits are results alone: no model has scales for them.
  if (!named || (named->is_result && named->elements != Elements::kFloat32)) return std::nullopt;
  return named->elements;
}

std::optional<Elements> resulting_elements(checkpoint::DType dtype) {
  const auto named = find(dtype);
  return named && named->is_result ? std::optional(named->elements) : std::nullopt;
}

BoxDequantization describe(const DequantizedFormats& formats, const copy::QuantizedBox& box) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (box.rows <= 0 || box.columns <= 0 || box.rows > kMost || box.columns > kMost ||
      static_cast<uint64_t>(box.rows) * segments_in_row(static_cast<uint64_t>(box.columns)) > kMost) {
    throw std::invalid_argument("a box that is empty, or too large for one launch");
  }
  BoxDequantization result{};
  const bool has_halves = formats.stored == Elements::kFloat4E2M1;
  result.from = reinterpret_cast<uint64_t>(box.from) + static_cast<uint64_t>(has_halves ? box.first_column / 2 : 0);
  result.scales = reinterpret_cast<uint64_t>(box.scales);
  result.to = reinterpret_cast<uint64_t>(box.to);
  result.row_stride = box.to_row_stride;
  result.column_stride = box.to_column_stride;
  result.row_bytes = static_cast<uint64_t>(box.from_stride);
  result.scales_in_row = static_cast<uint64_t>(box.scales_stride);
  result.rows = narrow(box.rows);
  result.columns = narrow(box.columns);
  // A block may be larger than 32 bits can tell. What counts is where it ends within the box.
  const auto fit = [](int64_t size, int64_t block, int64_t first, uint32_t& fitted_block, uint32_t& fitted_first) {
    const int64_t fitted = std::clamp<int64_t>(block, 1, size);
    fitted_block = narrow(fitted);
    fitted_first = narrow(fitted - std::min(block - first, fitted));
  };
  fit(box.rows, box.block_rows, box.first_row, result.block_rows, result.first_row);
  fit(box.columns, box.block_columns, box.first_column, result.block_columns, result.first_column);
  result.first_half = has_halves ? narrow(box.first_column % 2) : 0;
  result.has_exponents = formats.scales == copy::Scales::kE8M0 ? 1 : 0;
  result.stored = formats.stored;
  result.target = formats.target;
  result.destination = formats.destination;
  return result;
}

uint32_t thread_blocks(const BoxDequantization& box) {
  constexpr uint64_t kSegmentsInBlock = kDequantizeThreads / kWarpThreads;
  const uint64_t segments = uint64_t{box.rows} * segments_in_row(box.columns);
  return static_cast<uint32_t>(std::min<uint64_t>((segments + kSegmentsInBlock - 1) / kSegmentsInBlock, kMostBlocks));
}

}  // namespace dcp_fast::cuda
