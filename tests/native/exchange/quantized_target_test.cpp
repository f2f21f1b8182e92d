#include "exchange/quantized_target.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "box/cut.h"
#include "checkpoint/dtype.h"
#include "doctest/doctest.h"
#include "random.h"

namespace dcp_fast {
namespace {

using exchange::QuantizedTarget;
using testing::Ints;
using testing::Random;

checkpoint::DType dtype(std::string_view name) {
  for (size_t i = 0; i < checkpoint::kDTypes.size(); ++i) {
    if (checkpoint::kDTypes[i].name == name) return static_cast<checkpoint::DType>(i);
  }
  FAIL("no such dtype");
  return checkpoint::kUnknownDType;
}

}  // namespace

TEST_CASE("quantized elements are the same in whatever pieces they come") {
  Random random(71);
  for (int i = 0; i < 2000; ++i) {
    CAPTURE(i);
    const bool is_mxfp4 = random.chance(50);
    const int64_t block_bytes = random.pick(Ints{1, 2, 16});
    QuantizedTarget target;
    copy::QuantizedBox& box = target.box;
    box.block_rows = is_mxfp4 ? 1 : random.between(1, 5);
    box.block_columns = is_mxfp4 ? 2 * block_bytes : random.between(1, 9);
    box.rows = random.between(1, 7);
    box.columns = random.between(1, 40);
    box.first_row = random.between(0, box.block_rows - 1);
    box.first_column = random.between(0, box.block_columns - 1);
    const int64_t blocks = (box.first_column + box.columns - 1) / box.block_columns + 1;
    target.unit_bytes = is_mxfp4 ? block_bytes : 1;
    target.unit_columns = is_mxfp4 ? box.block_columns : 1;
    target.row_bytes = is_mxfp4 ? blocks * block_bytes : box.columns;
    const auto found = copy::find_dequantization(is_mxfp4 ? copy::Quantization::kMxfp4 : copy::Quantization::kElements,
                                                 is_mxfp4 ? copy::Scales::kE8M0 : copy::Scales::kFloat32,
                                                 is_mxfp4 ? checkpoint::kUnknownDType : dtype("float8_e5m2"),
                                                 dtype("float32"), dtype("float32"), true);
    REQUIRE(found);
    target.how = *found;

    const int64_t stored_row = target.row_bytes + random.between(0, 3) * target.unit_bytes;
    std::vector<std::byte> stored(static_cast<size_t>(box.rows * stored_row));
    for (std::byte& byte : stored) byte = static_cast<std::byte>(random.between(0, is_mxfp4 ? 255 : 100));
    const int64_t rows_of_blocks = (box.first_row + box.rows - 1) / box.block_rows + 1;
    std::vector<std::byte> scales(static_cast<size_t>(rows_of_blocks * blocks * copy::bytes_of(target.how.scales)));
    for (size_t scale = 0; scale * static_cast<size_t>(copy::bytes_of(target.how.scales)) < scales.size(); ++scale) {
      const auto value = static_cast<float>(random.between(1, 1000));
      if (is_mxfp4) scales[scale] = static_cast<std::byte>(random.between(100, 150));
      if (!is_mxfp4) std::memcpy(&scales[scale * sizeof(float)], &value, sizeof(float));
    }
    box.scales = scales.data();
    box.scales_stride = blocks;
    box.to_column_stride = 4;
    box.to_row_stride = 4 * (box.columns + random.between(0, 2));
    std::vector<std::byte> whole(static_cast<size_t>(box.rows * box.to_row_stride), std::byte{1});
    std::vector<std::byte> parts = whole;

    box.from = stored.data();
    box.from_stride = stored_row;
    box.to = whole.data();
    copy::dequantize(target.how, box);

    box.from = nullptr;
    box.to = parts.data();
    const box::Loops loops = target.loops(stored_row);
    const int64_t span = box::source_span(loops);
    for (int64_t begin = 0; begin < span;) {
      const int64_t end = std::min(span, begin + random.between(1, 12) * target.unit_bytes);
      std::vector<std::byte> packed;
      std::vector<box::Part> cut = box::cut(loops.data(), loops.size(), begin, end);
      for (const box::Part& part : cut) {
        const int64_t rows = part.loops.size() == 1 ? 1 : part.loops.front().size;
        REQUIRE(part.packed == static_cast<int64_t>(packed.size()));
        for (int64_t row = 0; row < rows; ++row) {
          const auto from = stored.begin() + part.source + row * stored_row;
          packed.insert(packed.end(), from, from + part.loops.back().size);
        }
      }
      for (const box::Part& part : cut) copy::dequantize(target.how, target.piece(part, packed.data() + part.packed));
      begin = end;
    }
    REQUIRE(parts == whole);
  }
}

}  // namespace dcp_fast
