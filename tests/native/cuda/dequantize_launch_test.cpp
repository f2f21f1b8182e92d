#include "cuda/dequantize_launch.h"

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "doctest/doctest.h"

using namespace dcp_fast;
using checkpoint::dtype_by_name;
using copy::Quantization;
using cuda::Elements;

namespace {

constexpr cuda::DequantizedFormats kFp8{Elements::kFloat8E4M3Fn, Elements::kFloat32, Elements::kBFloat16,
                                        copy::Scales::kFloat32};
constexpr cuda::DequantizedFormats kMxfp4{Elements::kFloat4E2M1, Elements::kFloat32, Elements::kBFloat16,
                                          copy::Scales::kE8M0};

copy::QuantizedBox box_of(int64_t rows, int64_t columns) {
  copy::QuantizedBox box;
  box.rows = rows;
  box.columns = columns;
  return box;
}

// In which block of the box an element lies, as the kernel has it.
uint32_t block_at(uint32_t position, uint32_t first, uint32_t size) { return (first + position) / size; }

}  // namespace

TEST_CASE("kernel that dequantizes: blocks end within the box where they should, of whatever size they are") {
  for (const int64_t block : {int64_t{1}, int64_t{7}, int64_t{128}, int64_t{1} << 40}) {
    for (const int64_t first : {int64_t{0}, int64_t{5}, block / 2, block - 1}) {
      if (first >= block) continue;
      copy::QuantizedBox box = box_of(300, 20);
      box.block_rows = box.block_columns = block;
      box.first_row = box.first_column = first;
      const cuda::BoxDequantization described = cuda::describe(kFp8, box);
      for (uint32_t i = 0; i < 300; ++i) {
        CHECK(block_at(i, described.first_row, described.block_rows) == (first + i) / block);
      }
      for (uint32_t i = 0; i < 20; ++i) {
        CHECK(block_at(i, described.first_column, described.block_columns) == (first + i) / block);
      }
    }
  }
}

TEST_CASE("kernel that dequantizes: rows of MXFP4 begin with the byte of their first element") {
  copy::QuantizedBox box = box_of(4, 100);
  box.block_columns = 32;
  for (const int64_t first : {0, 1, 2, 31}) {
    box.first_column = first;
    const cuda::BoxDequantization described = cuda::describe(kMxfp4, box);
    CHECK(described.from == static_cast<uint64_t>(first / 2));
    CHECK(described.first_half == first % 2);
    CHECK(described.has_exponents == 1);
    CHECK(described.first_column == first);
  }
}

TEST_CASE("kernel that dequantizes: boxes of a size that it cannot count") {
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{0, 1},
                                      {1, 0},
                                      {-1, 1},
                                      {int64_t{1} << 31, 1},
                                      {1, int64_t{1} << 31},
                                      {int64_t{1} << 20, int64_t{1} << 20}}) {
    CHECK_THROWS_AS(cuda::describe(kFp8, box_of(rows, columns)), std::invalid_argument);
  }
  CHECK(cuda::thread_blocks(cuda::describe(kFp8, box_of(1, 1))) == 1);
  CHECK(cuda::thread_blocks(cuda::describe(kFp8, box_of(3, 1000))) == 3);
  CHECK(cuda::thread_blocks(cuda::describe(kFp8, box_of(1, (int64_t{1} << 31) - 1))) == 4096);
}

TEST_CASE("kernel that dequantizes: formats that it knows") {
  const auto stored = [](const char* name) {
    return cuda::stored_elements(Quantization::kElements, dtype_by_name(name));
  };
  CHECK(stored("float8_e4m3fn") == Elements::kFloat8E4M3Fn);
  CHECK(stored("float8_e5m2") == Elements::kFloat8E5M2);
  CHECK(stored("float8_e4m3fnuz") == Elements::kFloat8E4M3Fnuz);
  CHECK(stored("float8_e5m2fnuz") == Elements::kFloat8E5M2Fnuz);
  CHECK(stored("float32") == Elements::kFloat32);
  CHECK_FALSE(stored("bfloat16"));
  CHECK_FALSE(stored("int8"));
  CHECK_FALSE(cuda::stored_elements(Quantization::kElements, checkpoint::kUnknownDType));
  CHECK(cuda::stored_elements(Quantization::kMxfp4, checkpoint::kUnknownDType) == Elements::kFloat4E2M1);
  CHECK(cuda::resulting_elements(dtype_by_name("bfloat16")) == Elements::kBFloat16);
  CHECK(cuda::resulting_elements(dtype_by_name("float16")) == Elements::kFloat16);
  CHECK(cuda::resulting_elements(dtype_by_name("float32")) == Elements::kFloat32);
  CHECK_FALSE(cuda::resulting_elements(dtype_by_name("float8_e4m3fn")));
  CHECK_FALSE(cuda::resulting_elements(checkpoint::kUnknownDType));
}
