#include "copy/convert.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

#include "copy/copy.h"

namespace dcp_fast::copy {

namespace {

// What is converted at once, between buffers that stay in the first cache.
constexpr std::size_t kTile = 1024;  // elements
using Tile = std::array<std::byte, kTile * 8>;
constexpr int64_t kSquare = 32;  // the side of a tile of two dimensions

struct NamedFormat {
  std::string_view dtype;
  Format format;
};

constexpr std::array<NamedFormat, 14> kFormats = {{
    {"int8", Format::kInt8},
    {"uint8", Format::kUint8},
    {"int16", Format::kInt16},
    {"int32", Format::kInt32},
    {"int64", Format::kInt64},
    {"float32", Format::kFloat32},
    {"float64", Format::kFloat64},
    {"float16", Format::kFloat16},
    {"bfloat16", Format::kBFloat16},
    {"float8_e4m3fn", Format::kFloat8E4M3Fn},
    {"float8_e4m3fnuz", Format::kFloat8E4M3Fnuz},
    {"float8_e5m2", Format::kFloat8E5M2},
    {"float8_e5m2fnuz", Format::kFloat8E5M2Fnuz},
    {"bool", Format::kBool},
}};

const NamedFormat* find_format(checkpoint::DType dtype) {
  if (dtype == checkpoint::kUnknownDType) return nullptr;
  const std::string_view name = checkpoint::info(dtype).name;
  const auto* found = std::find_if(kFormats.begin(), kFormats.end(),
                                   [name](const NamedFormat& format) { return format.dtype == name; });
  return found == kFormats.end() ? nullptr : found;
}

bool torch_has_vectors() {
  const auto& runnable = runnable_vectors();
  return std::find(runnable.begin(), runnable.end(), Vectors::kAvx2) != runnable.end();
}

// Elements side by side, tile by tile where they pass through a buffer.
void convert_tiles(const Conversion& conversion, std::byte* to, const std::byte* from, std::size_t count,
                   bool streamed) {
  alignas(kLine) Tile middle;
  alignas(kLine) Tile last;
  const auto from_bytes = static_cast<std::size_t>(conversion.from_bytes);
  const auto to_bytes = static_cast<std::size_t>(conversion.to_bytes);
  // All tiles but the first begin where a line does.
  std::size_t tile = streamed ? (kLine - reinterpret_cast<std::uintptr_t>(to) % kLine) / to_bytes : kTile;
  for (std::size_t done = 0; done < count; done += tile, tile = kTile) {
    tile = std::min(tile, count - done);
    std::byte* out = streamed ? last.data() : to + done * to_bytes;
    const std::byte* in = from + done * from_bytes;
    if (conversion.second == nullptr) {
      conversion.first(out, in, tile);
    } else {
      conversion.first(middle.data(), in, tile);
      conversion.second(out, middle.data(), tile);
    }
    if (streamed) stream_unfenced(conversion.vectors, to + done * to_bytes, out, tile * to_bytes);
  }
}

void convert_elements(const Conversion& conversion, std::byte* to, const std::byte* from, std::size_t count,
                      bool streamed) {
  streamed = streamed && reinterpret_cast<std::uintptr_t>(to) % static_cast<std::size_t>(conversion.to_bytes) == 0;
  if (conversion.second == nullptr && !streamed) return conversion.first(to, from, count);
  convert_tiles(conversion, to, from, count, streamed);
}

// Where elements do not lie side by side: gathers a tile of two dimensions, converts it, and scatters it.
void convert_strided(const Conversion& conversion, std::byte* to, const std::byte* from, const box::Dim& outer,
                     const box::Dim& inner) {
  alignas(kLine) Tile gathered;
  alignas(kLine) Tile converted;
  const int64_t columns = std::min(inner.size, std::max<int64_t>(kSquare, static_cast<int64_t>(kTile) / outer.size));
  const int64_t rows = std::min(outer.size, static_cast<int64_t>(kTile) / columns);
  for (int64_t i = 0; i < outer.size; i += rows) {
    for (int64_t j = 0; j < inner.size; j += columns) {
      const int64_t height = std::min(rows, outer.size - i);
      const int64_t width = std::min(columns, inner.size - j);
      const int64_t from_bytes = conversion.from_bytes;
      const int64_t to_bytes = conversion.to_bytes;
      const std::array<box::Dim, 3> gather{{{height, outer.source_stride, width * from_bytes},
                                            {width, inner.source_stride, from_bytes},
                                            {from_bytes, 1, 1}}};
      const std::array<box::Dim, 3> scatter{{{height, width * to_bytes, outer.destination_stride},
                                             {width, to_bytes, inner.destination_stride},
                                             {to_bytes, 1, 1}}};
      box::copy(gathered.data(), from + i * outer.source_stride + j * inner.source_stride, gather.data(), 3);
      convert_elements(conversion, converted.data(), gathered.data(), static_cast<std::size_t>(height * width), false);
      box::copy(to + i * outer.destination_stride + j * inner.destination_stride, converted.data(), scatter.data(), 3);
    }
  }
}

// `depth`: of the loops over elements.
void convert_loops(const Conversion& conversion, std::byte* to, const std::byte* from, const box::Dim* loops,
                   std::size_t depth, bool streamed) {
  if (depth == 0) return convert_elements(conversion, to, from, 1, false);
  const box::Dim& inner = loops[depth - 1];
  const bool side_by_side =
      inner.source_stride == conversion.from_bytes && inner.destination_stride == conversion.to_bytes;
  if (depth == 1 && side_by_side) {
    return convert_elements(conversion, to, from, static_cast<std::size_t>(inner.size), streamed);
  }
  if (depth == 1) return convert_strided(conversion, to, from, {1, 0, 0}, inner);
  if (depth == 2 && !side_by_side) return convert_strided(conversion, to, from, loops[0], inner);
  for (int64_t i = 0; i < loops->size; ++i) {
    convert_loops(conversion, to + i * loops->destination_stride, from + i * loops->source_stride, loops + 1, depth - 1,
                  streamed);
  }
}

}  // namespace

std::optional<Conversion> find_conversion(checkpoint::DType from, checkpoint::DType to, bool inner_contiguous,
                                          Vectors vectors) {
  const NamedFormat* source = find_format(from);
  const NamedFormat* target = find_format(to);
  if (source == nullptr || target == nullptr) return std::nullopt;
  Conversion conversion;
  conversion.same_dtype = source == target;
  if (conversion.same_dtype && source->format != Format::kBool) return std::nullopt;
  conversion.from_bytes = static_cast<int32_t>(checkpoint::info(from).itemsize);
  conversion.to_bytes = static_cast<int32_t>(checkpoint::info(to).itemsize);
  conversion.vectors = vectors;
  const bool ones = target->format == Format::kBFloat16 && inner_contiguous && torch_has_vectors() &&
                    (source->format == Format::kFloat32 || source->format == Format::kFloat64);
  const Format format = ones ? Format::kBFloat16OnesNan : target->format;
  conversion.first = find_step(source->format, format, vectors);
  if (conversion.first != nullptr) return conversion;
  conversion.first = find_step(source->format, Format::kFloat32, vectors);
  conversion.second = find_step(Format::kFloat32, format, vectors);
  if (conversion.first == nullptr || conversion.second == nullptr) return std::nullopt;
  return conversion;
}

std::optional<Conversion> find_conversion(checkpoint::DType from, checkpoint::DType to, bool inner_contiguous) {
  return find_conversion(from, to, inner_contiguous, runnable_vectors().back());
}

void convert_box(const Conversion& conversion, std::byte* to, const std::byte* from, const box::Dim* loops,
                 std::size_t depth) {
  if (depth == 0) return;
  std::int64_t bytes = conversion.to_bytes;
  for (std::size_t i = 0; i + 1 < depth; ++i) bytes *= loops[i].size;
  const bool streamed = bytes >= static_cast<std::int64_t>(kStreamedBytes);
  convert_loops(conversion, to, from, loops, depth - 1, streamed);
  if (streamed) fence_streams();
}

}  // namespace dcp_fast::copy
