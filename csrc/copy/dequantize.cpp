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
using Floats = std::array<float, kRun>;

float scale_at(Scales scales, const std::byte* begin, int64_t index) {
  if (scales == Scales::kE8M0) return float_of(Float8E8M0::to_float32(std::to_integer<uint8_t>(begin[index])));
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

// Some elements of a row of MXFP4 as float32, not scaled yet.
void decode_blocks(const QuantizedBox& box, float* to, const std::byte* row, int64_t column, int64_t count) {
  const int64_t begin = box.first_column + column;
  for (int64_t at = begin; at < begin + count; ++at) {
    const auto byte = std::to_integer<uint8_t>(row[at / 2]);
    to[at - begin] = float_of(Float4E2M1::to_float32(at % 2 == 0 ? byte & 15 : byte >> 4));
  }
}

// Some elements of a row as float32, not scaled yet.
void decode(const Dequantization& how, const QuantizedBox& box, float* to, const std::byte* row, int64_t column,
            int64_t count) {
  if (how.quantization == Quantization::kMxfp4) return decode_blocks(box, to, row, column, count);
  const std::byte* in = row + column * how.from_bytes;
  if (how.decode) return apply(*how.decode, to, in, count);
  std::memcpy(to, in, static_cast<std::size_t>(count) * sizeof(float));
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
        box_.scales + (box_.first_row + row) / box_.block_rows * box_.scales_stride * bytes_of(how_.scales);
    std::byte* to = box_.to + row * box_.to_row_stride;
    int64_t tile = kRun;
    if (streamed_) {  // all tiles but the first begin where a line does
      const auto past = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLine);
      tile = past == 0 ? kRun : (static_cast<int64_t>(kLine) - past) / how_.to_bytes;
    }
    for (int64_t column = 0; column < box_.columns; column += tile, tile = kRun) {
      tile = std::min(tile, box_.columns - column);
      store(to + column * box_.to_column_stride, convert_run(from, scales, column, tile), tile);
    }
  }

  // Returns elements as the destination has them.
  const std::byte* convert_run(const std::byte* from, const std::byte* scales, int64_t column, int64_t count) {
    const std::byte* done = nullptr;
    if (how_.step == nullptr && how_.blocks_step == nullptr) {
      decode(how_, box_, floats_.data(), from, column, count);
      for_blocks(column, count, [&](int64_t block, int64_t begin, int64_t end) {
        scale_floats(begin, end, scale_at(how_.scales, scales, block));
      });
      done = round(rounded_.data(), count);
    } else {
      step(from, scales, column, count);
      done = rounded_.data();
    }
    if (!how_.place) return done;
    apply(*how_.place, placed_.data(), done, count);
    return placed_.data();
  }

  // Calls a function with each block that some elements lie in, and the first of these and the one past the last.
  template <typename Function>
  void for_blocks(int64_t column, int64_t count, const Function& function) const {
    const int64_t first = box_.first_column + column;
    int64_t block = first / box_.block_columns;
    int64_t end = std::min(count, (block + 1) * box_.block_columns - first);
    for (int64_t begin = 0; begin < count; ++block, begin = end, end = std::min(count, end + box_.block_columns)) {
      function(block, begin, end);
    }
  }

  void step(const std::byte* from, const std::byte* scales, int64_t column, int64_t count) {
    if (how_.blocks_step != nullptr) {
      const int64_t first = box_.first_column + column;
      const int64_t head = std::min(count, (kMxfp4Block - first % kMxfp4Block) % kMxfp4Block);
      const int64_t blocks = (count - head) / kMxfp4Block;
      scale_rest(from, scales, column, 0, head);
      how_.blocks_step(rounded_.data() + head * how_.target_bytes, from + (first + head) / 2,
                       scales + (first + head) / kMxfp4Block, blocks);
      return scale_rest(from, scales, column, head + blocks * kMxfp4Block, count);
    }
    for_blocks(column, count, [&](int64_t block, int64_t begin, int64_t end) {
      const float scale = scale_at(how_.scales, scales, block);
      if (can_step(scale)) {
        how_.step(rounded_.data() + begin * how_.target_bytes, from + column + begin, end - begin, scale);
      } else {
        scale_rest(from, scales, column, begin, end);
      }
    });
  }

  // Does with some elements what no step does.
  void scale_rest(const std::byte* from, const std::byte* scales, int64_t column, int64_t begin, int64_t end) {
    if (begin == end) return;
    decode(how_, box_, floats_.data(), from, column + begin, end - begin);
    for_blocks(column + begin, end - begin, [&](int64_t block, int64_t first, int64_t last) {
      scale_floats(first, last, scale_at(how_.scales, scales, block));
    });
    std::byte* to = rounded_.data() + begin * how_.target_bytes;
    const std::byte* done = round(to, end - begin);
    if (done != to) std::memcpy(to, done, static_cast<std::size_t>((end - begin) * how_.target_bytes));
  }

  void scale_floats(int64_t begin, int64_t end, float scale) {
    float* values = floats_.data();
    for (int64_t i = begin; i < end; ++i) values[i] *= scale;
  }

  // Returns where elements of the target dtype are: `to`, or where they were as float32.
  std::byte* round(std::byte* to, int64_t count) {
    if (!how_.round) return reinterpret_cast<std::byte*>(floats_.data());
    apply(*how_.round, to, floats_.data(), count);
    return to;
  }

  void store(std::byte* to, const std::byte* from, int64_t count) const {
    const auto bytes = static_cast<std::size_t>(count * how_.to_bytes);
    if (streamed_) return stream_unfenced(vectors_, to, from, bytes);
    if (!contiguous_) return scatter(to, box_.to_column_stride, from, count, how_.to_bytes);
    std::memcpy(to, from, bytes);
  }

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

std::optional<StepTarget> step_target_of(checkpoint::DType dtype) {
  if (dtype == checkpoint::dtype_by_name("float32")) return StepTarget::kFloat32;
  if (dtype == checkpoint::dtype_by_name("bfloat16")) return StepTarget::kBFloat16;
  return dtype == checkpoint::dtype_by_name("float16") ? std::optional(StepTarget::kFloat16) : std::nullopt;
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
  found.target_bytes = static_cast<int32_t>(checkpoint::info(target).itemsize);
  found.to_bytes = static_cast<int32_t>(checkpoint::info(destination).itemsize);
  if (const auto step_target = step_target_of(target)) {
    if (quantization == Quantization::kMxfp4) {
      found.blocks_step = find_mxfp4_step(*step_target);
    } else {
      found.step = find_scaled_step(stored, *step_target);
    }
  }
  return found;
}

void dequantize(const Dequantization& how, const QuantizedBox& box) {
  Dequantization used = how;
  // Calls for a few elements each would take longer than loops over many.
  if (box.block_columns < kMxfp4Block) used.step = nullptr;
  if (box.block_columns != kMxfp4Block) used.blocks_step = nullptr;
  Rows(used, box).place_all();
}

}  // namespace dcp_fast::copy
