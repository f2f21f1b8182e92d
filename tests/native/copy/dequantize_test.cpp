#include "copy/dequantize.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "copy/numbers.h"
#include "doctest/doctest.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::dtype_by_name;

namespace {

copy::Dequantization find(copy::Quantization quantization, copy::Scales scales, const std::string& target,
                          const std::string& destination, const std::string& stored = "float8_e4m3fn") {
  const auto found = copy::find_dequantization(quantization, scales, dtype_by_name(stored), dtype_by_name(target),
                                               dtype_by_name(destination), true);
  REQUIRE(found);
  return *found;
}

// What a box becomes, with '#' around and between its elements.
std::string dequantized(const copy::Dequantization& how, copy::QuantizedBox box, int64_t gap, int64_t margin) {
  box.to_column_stride = how.to_bytes + gap;
  box.to_row_stride = box.columns * box.to_column_stride + gap;
  std::string to(static_cast<size_t>(2 * margin + box.rows * box.to_row_stride), '#');
  box.to = reinterpret_cast<std::byte*>(to.data()) + margin;
  copy::dequantize(how, box);
  return to;
}

copy::Dequantization without_steps(copy::Dequantization how) {
  how.step = nullptr;
  how.blocks_step = nullptr;
  return how;
}

}  // namespace

TEST_CASE("FP8: loops of their own do as the steps one by one") {
  Random random(1);
  for (const std::string target : {"float32", "bfloat16", "float16"}) {
    for (int round = 0; round < 400; ++round) {
      const auto* format =
          random.pick<const char*>({"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"});
      const int64_t rows = random.between(1, 9);
      const int64_t columns = round % 20 == 0 ? random.between(2000, 40000) : random.between(1, 300);
      const int64_t block = random.pick<int64_t>({1, 7, 32, 33, 128});
      copy::QuantizedBox box;
      box.rows = rows;
      box.columns = columns;
      box.block_rows = box.block_columns = block;
      box.first_row = random.between(0, block - 1);
      box.first_column = random.between(0, block - 1);
      box.scales_stride = (box.first_column + columns - 1) / block + 1;
      const int64_t down = (box.first_row + rows - 1) / block + 1;
      std::vector<float> scales;
      for (int64_t i = 0; i < down * box.scales_stride; ++i) {
        // Any bits but those of NaNs, of which a product may keep one or another.
        float scale = 0;
        do std::memcpy(&scale, random.bytes(sizeof(scale)).data(), sizeof(scale));
        while (scale != scale);
        scales.push_back(random.chance(50) ? scale : static_cast<float>(random.between(-1000, 1000)) / 64);
      }
      const std::string stored = random.bytes(static_cast<size_t>(rows * columns));
      box.from = reinterpret_cast<const std::byte*>(stored.data());
      box.from_stride = columns;
      box.scales = reinterpret_cast<const std::byte*>(scales.data());
      const auto how = find(copy::Quantization::kElements, copy::Scales::kFloat32, target, target, format);
      const int64_t gap = random.pick<int64_t>({0, 0, 1, 4});
      const int64_t margin = random.between(0, 70);
      const std::string actual = dequantized(how, box, gap, margin);
      CAPTURE(std::string(format));
      CHECK(actual == dequantized(without_steps(how), box, gap, margin));
    }
  }
}

TEST_CASE("MXFP4: whole blocks do as parts of them") {
  Random random(2);
  for (const std::string target : {"float32", "bfloat16", "float16"}) {
    for (int round = 0; round < 200; ++round) {
      copy::QuantizedBox box;
      box.rows = random.between(1, 5);
      box.columns = round % 20 == 0 ? random.between(2000, 40000) : random.between(1, 300);
      box.block_columns = random.pick<int64_t>({2, 16, 32, 32, 32});
      box.first_column = random.between(0, box.block_columns - 1);
      box.scales_stride = (box.first_column + box.columns - 1) / box.block_columns + 1;
      box.from_stride = box.scales_stride * box.block_columns / 2;
      const std::string stored = random.bytes(static_cast<size_t>(box.rows * box.from_stride));
      std::string exponents = random.bytes(static_cast<size_t>(box.rows * box.scales_stride));
      for (char& exponent : exponents) exponent = exponent == '\xff' ? '\x7f' : exponent;  // no NaN
      box.from = reinterpret_cast<const std::byte*>(stored.data());
      box.scales = reinterpret_cast<const std::byte*>(exponents.data());
      const auto how = find(copy::Quantization::kMxfp4, copy::Scales::kE8M0, target, target);
      const int64_t gap = random.pick<int64_t>({0, 0, 3});
      const int64_t margin = random.between(0, 70);
      const std::string actual = dequantized(how, box, gap, margin);
      CHECK(actual == dequantized(without_steps(how), box, gap, margin));
    }
  }
}

TEST_CASE("scales of MXFP4 are powers of two, and a NaN") {
  const auto scale = [](uint8_t exponent) { return copy::float_of(copy::Float8E8M0::to_float32(exponent)); };
  CHECK(scale(127) == 1.0F);
  CHECK(scale(254) == 0x1p127F);
  CHECK(scale(0) == 0x1p-127F);
  CHECK(scale(255) != scale(255));
}

TEST_CASE("elements of MXFP4 are the numbers of the specification") {
  const std::vector<float> numbers = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};
  for (uint8_t code = 0; code < 8; ++code) {
    CHECK(copy::float_of(copy::Float4E2M1::to_float32(code)) == numbers[code]);
    CHECK(copy::Float4E2M1::to_float32(code | 8) == copy::bits_of(-numbers[code]));
  }
}

TEST_CASE("dtypes that no conversion knows") {
  const auto found = [](const char* stored, const char* target, const char* destination) {
    return copy::find_dequantization(copy::Quantization::kElements, copy::Scales::kFloat32, dtype_by_name(stored),
                                     dtype_by_name(target), dtype_by_name(destination), true)
        .has_value();
  };
  CHECK(found("float8_e4m3fn", "bfloat16", "float64"));
  CHECK(found("float32", "float32", "float32"));
  CHECK_FALSE(found("complex64", "float32", "float32"));
  CHECK_FALSE(found("float8_e4m3fn", "float32", "int32"));
  CHECK_FALSE(found("float8_e4m3fn", "no such", "float32"));
}
