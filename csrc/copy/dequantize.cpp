#include "copy/dequantize.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "copy/copy.h"
#include "copy/cpu.h"
#include "copy/numbers.h"

namespace dcp_fast::copy {

namespace {

constexpr int64_t kRun = 1024;  // elements: so many pass through buffers that stay in the first cache
using Run = std::array<std::byte, kRun * 8>;
using Floats = std::array<float, kRun + 2>;

// The two numbers of each byte of MXFP4.
struct Pair {
  float low = 0;
  float high = 0;
};
constexpr std::array<float, 16> kE2M1 = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,  4.0F,  6.0F,
                                         -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};
constexpr std::array<Pair, 256> make_pairs() {
  std::array<Pair, 256> pairs{};
  for (std::size_t byte = 0; byte < pairs.size(); ++byte) pairs[byte] = {kE2M1[byte & 15], kE2M1[byte >> 4]};
  return pairs;
}
constexpr std::array<Pair, 256> kPairs = make_pairs();

float scale_of_exponent(uint8_t bits) {
  constexpr uint8_t kNan = 0xff;
  if (bits == kNan) return std::numeric_limits<float>::quiet_NaN();
  // The least power of two is a subnormal float32.
  return float_of(bits == 0 ? 1U << (kFloat32Mantissa - 1) : static_cast<uint32_t>(bits) << kFloat32Mantissa);
}

float scale_at(Scales scales, const std::byte* begin, int64_t index) {
  if (scales == Scales::kE8M0) return scale_of_exponent(std::to_integer<uint8_t>(begin[index]));
  float scale = 0;
  std::memcpy(&scale, begin + index * static_cast<int64_t>(sizeof(scale)), sizeof(scale));
  return scale;
}

void apply(const Conversion& conversion, void* to, const void* from, int64_t count) {
  const auto elements = static_cast<std::size_t>(count);
  if (conversion.second == nullptr) return conversion.first(to, from, elements);
  alignas(kLine) Floats middle;
  conversion.first(middle.data(), from, elements);
  conversion.second(to, middle.data(), elements);
}

// Some elements of a row as float32, not scaled yet. Returns where the first one is in `floats`.
float* decode(const Dequantization& how, const QuantizedBox& box, Floats& floats, const std::byte* row, int64_t column,
              int64_t count) {
  if (how.quantization == Quantization::kMxfp4) {
    const int64_t begin = box.first_column + column;
    const int64_t bytes = (begin + count + 1) / 2 - begin / 2;
    const std::byte* in = row + begin / 2;
    for (int64_t i = 0; i < bytes; ++i) {
      const Pair& pair = kPairs[std::to_integer<std::size_t>(in[i])];
      std::memcpy(floats.data() + 2 * i, &pair, sizeof(pair));
    }
    return floats.data() + begin % 2;
  }
  const std::byte* in = row + column * how.from_bytes;
  if (how.decode) {
    apply(*how.decode, floats.data(), in, count);
  } else {
    std::memcpy(floats.data(), in, static_cast<std::size_t>(count) * sizeof(float));
  }
  return floats.data();
}

void multiply(const Dequantization& how, const QuantizedBox& box, float* values, const std::byte* scales,
              int64_t column, int64_t count) {
  const int64_t begin = box.first_column + column;
  int64_t block = begin / box.block_columns;
  int64_t end = std::min(count, (block + 1) * box.block_columns - begin);
  for (int64_t i = 0; i < count; ++block, end = std::min(count, end + box.block_columns)) {
    const float scale = scale_at(how.scales, scales, block);
    for (; i < end; ++i) values[i] *= scale;
  }
}

void scatter(std::byte* to, int64_t stride, const std::byte* from, int64_t count, int64_t itemsize) {
  const auto size = static_cast<std::size_t>(itemsize);
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * itemsize, size);
}

class Rows {
 public:
  Rows(const Dequantization& how, const QuantizedBox& box)
      : how_(how),
        box_(box),
        vectors_(runnable_vectors().back()),
        contiguous_(box.to_column_stride == how.to_bytes),
        streamed_(contiguous_ && box.rows * box.columns * how.to_bytes >= static_cast<int64_t>(kStreamedBytes) &&
                  reinterpret_cast<std::uintptr_t>(box.to) % static_cast<std::uintptr_t>(how.to_bytes) == 0 &&
                  box.to_row_stride % how.to_bytes == 0) {}

  void place_all() {
    for (int64_t row = 0; row < box_.rows; ++row) place(row);
    if (streamed_) fence_streams();
  }

 private:
  void place(int64_t row) {
    const std::byte* from = box_.from + row * box_.from_stride;
    const std::byte* scales =
        box_.scales + (box_.first_row + row) / box_.block_rows * box_.scales_stride * scale_bytes();
    std::byte* to = box_.to + row * box_.to_row_stride;
    int64_t tile = kRun;
    if (streamed_) {  // all tiles but the first begin where a line does
      const auto past = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLine);
      tile = past == 0 ? kRun : (static_cast<int64_t>(kLine) - past) / how_.to_bytes;
    }
    for (int64_t column = 0; column < box_.columns; column += tile, tile = kRun) {
      tile = std::min(tile, box_.columns - column);
      float* values = decode(how_, box_, floats_, from, column, tile);
      multiply(how_, box_, values, scales, column, tile);
      store(to + column * box_.to_column_stride, finish(values, tile), tile);
    }
  }

  const std::byte* finish(const float* values, int64_t count) {
    const auto* done = reinterpret_cast<const std::byte*>(values);
    if (how_.round) {
      apply(*how_.round, rounded_.data(), done, count);
      done = rounded_.data();
    }
    if (how_.place) {
      apply(*how_.place, placed_.data(), done, count);
      done = placed_.data();
    }
    return done;
  }

  void store(std::byte* to, const std::byte* from, int64_t count) const {
    const auto bytes = static_cast<std::size_t>(count * how_.to_bytes);
    if (streamed_) return stream_unfenced(vectors_, to, from, bytes);
    if (!contiguous_) return scatter(to, box_.to_column_stride, from, count, how_.to_bytes);
    std::memcpy(to, from, bytes);
  }

  int64_t scale_bytes() const { return how_.scales == Scales::kE8M0 ? 1 : static_cast<int64_t>(sizeof(float)); }

  const Dequantization& how_;
  const QuantizedBox& box_;
  Vectors vectors_;
  bool contiguous_;
  bool streamed_;
  alignas(kLine) Floats floats_;
  alignas(kLine) Run rounded_;
  alignas(kLine) Run placed_;
};

// Sets a conversion if one is needed. Returns whether there is one then.
bool find(std::optional<Conversion>& conversion, checkpoint::DType from, checkpoint::DType to, bool inner_contiguous) {
  if (from == to) return true;
  conversion = find_conversion(from, to, inner_contiguous);
  return conversion.has_value();
}

}  // namespace

std::optional<Dequantization> find_dequantization(Quantization quantization, Scales scales, checkpoint::DType stored,
                                                  checkpoint::DType target, checkpoint::DType destination,
                                                  bool inner_contiguous) {
  constexpr checkpoint::DType kFloat32 = checkpoint::dtype_by_name("float32");
  Dequantization found;
  found.quantization = quantization;
  found.scales = scales;
  if (destination == checkpoint::kUnknownDType || target == checkpoint::kUnknownDType) return std::nullopt;
  if (quantization == Quantization::kElements) {
    if (stored == checkpoint::kUnknownDType || !find(found.decode, stored, kFloat32, true)) return std::nullopt;
    found.from_bytes = static_cast<int32_t>(checkpoint::info(stored).itemsize);
  }
  if (!find(found.round, kFloat32, target, true)) return std::nullopt;
  if (!find(found.place, target, destination, inner_contiguous)) return std::nullopt;
  found.to_bytes = static_cast<int32_t>(checkpoint::info(destination).itemsize);
  return found;
}

void dequantize(const Dequantization& how, const QuantizedBox& box) { Rows(how, box).place_all(); }

}  // namespace dcp_fast::copy
