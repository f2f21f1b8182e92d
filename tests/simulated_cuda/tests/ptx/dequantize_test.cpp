// The text of the kernel that dequantizes, run by the interpreter, against numbers worked out from the formats'
// definitions in double.
#include "cuda/dequantize.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "instruction_kernel.h"
#include "ptx/interpreter.h"
#include "random.h"
#include "sparse_memory.h"

using namespace simcuda::testing;
using dcp_fast::cuda::BoxDequantization;
using dcp_fast::cuda::Elements;
using dcp_fast::testing::Random;
using simcuda::ptx::Module;

namespace {

constexpr uint64_t kFrom = uint64_t{1} << 33;
constexpr uint64_t kScales = uint64_t{1} << 36;
constexpr uint64_t kTo = uint64_t{1} << 40;

// A float of a sign, an exponent and a mantissa. `most`: the largest magnitude of a number, as bits.
struct Format {
  int bits;
  int mantissa;
  int bias;
  uint32_t most;
  bool has_infinity;
  bool has_negative_zero;
};

const std::map<Elements, Format> kFormats{
    {Elements::kFloat32, {32, 23, 127, 0x7f7fffff, true, true}},
    {Elements::kBFloat16, {16, 7, 127, 0x7f7f, true, true}},
    {Elements::kFloat16, {16, 10, 15, 0x7bff, true, true}},
    {Elements::kFloat8E4M3Fn, {8, 3, 7, 0x7e, false, true}},
    {Elements::kFloat8E5M2, {8, 2, 15, 0x7b, true, true}},
    {Elements::kFloat8E4M3Fnuz, {8, 3, 8, 0x7f, false, false}},
    {Elements::kFloat8E5M2Fnuz, {8, 2, 16, 0x7f, false, false}},
    {Elements::kFloat4E2M1, {4, 1, 1, 7, false, true}},
};

double decoded(const Format& format, uint32_t bits) {
  const uint32_t sign = uint32_t{1} << (format.bits - 1);
  const uint32_t magnitude = bits & (sign - 1);
  const double direction = (bits & sign) != 0 ? -1 : 1;
  if (bits == sign && !format.has_negative_zero) return NAN;
  if (magnitude > format.most) {
    return magnitude == format.most + 1 && format.has_infinity ? direction * INFINITY : NAN;
  }
  const int exponent = static_cast<int>(magnitude >> format.mantissa);
  const uint32_t rest = magnitude & ((uint32_t{1} << format.mantissa) - 1);
  const uint32_t whole = exponent == 0 ? rest : rest | uint32_t{1} << format.mantissa;
  return direction * std::ldexp(whole, std::max(exponent, 1) - format.bias - format.mantissa);
}

// The nearest number, ties to even.
double rounded(const Format& format, double value) {
  if (std::isnan(value) || std::isinf(value) || value == 0) return value;
  const int exponent = std::max(std::ilogb(value), 1 - format.bias) - format.mantissa;
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -exponent)), exponent);
  return std::abs(result) > decoded(format, format.most) ? std::copysign(INFINITY, value) : result;
}

double scale_of(bool is_exponent, uint32_t bits) {
  if (!is_exponent) return decoded(kFormats.at(Elements::kFloat32), bits);
  return bits == 255 ? NAN : std::ldexp(1, static_cast<int>(bits) - 127);
}

bool is_same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

std::string kernel_text() {
  std::ifstream file(DEQUANTIZE_PTX);
  if (!file) throw std::runtime_error("cannot open " DEQUANTIZE_PTX);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

struct Launch {
  BoxDequantization box;
  SparseMemory memory;
};

uint32_t read(SparseMemory& memory, uint64_t address, int bytes) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= std::to_integer<uint32_t>(*memory.at(address + i)) << 8 * i;
  return value;
}

uint32_t random_scale(Random& random) {
  const auto anything = static_cast<uint32_t>(random.below(size_t{1} << 32));
  const float number = static_cast<float>(random.between(-1000, 1000)) / 64;
  uint32_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  return random.pick<uint32_t>({anything, bits, bits, bits});
}

// Only stored elements and scales may be read, and only the box's elements written, each byte once.
Launch random_launch(Random& random, Elements stored, Elements target, Elements destination, bool has_exponents) {
  Launch launch;
  BoxDequantization& box = launch.box;
  box = {};
  box.stored = stored;
  box.target = target;
  box.destination = destination;
  box.has_exponents = has_exponents ? 1 : 0;
  box.rows = static_cast<uint32_t>(random.between(1, 12));
  box.columns = random.pick<uint32_t>({1, 3, 31, 32, 33, 127, 128, 129, 260});
  box.block_rows = static_cast<uint32_t>(random.between(1, box.rows));
  box.block_columns = static_cast<uint32_t>(random.between(1, box.columns));
  box.first_row = static_cast<uint32_t>(random.below(box.block_rows));
  box.first_column = static_cast<uint32_t>(random.below(box.block_columns));
  const bool has_halves = stored == Elements::kFloat4E2M1;
  box.first_half = has_halves ? static_cast<uint32_t>(random.below(2)) : 0;
  const uint32_t item = stored == Elements::kFloat32 ? 4 : 1;
  const uint32_t row = has_halves ? (box.columns + box.first_half + 1) / 2 : box.columns * item;
  box.from = kFrom + 64 * random.below(10);
  box.row_bytes = row + item * random.below(3);
  box.scales = kScales;
  box.scales_in_row = (box.first_column + box.columns - 1) / box.block_columns + 1 + random.below(2);
  const uint32_t bytes = destination == Elements::kFloat32 ? 4 : 2;
  box.to = kTo + bytes * random.below(10);
  const bool by_rows = random.chance(70);
  box.column_stride = by_rows ? bytes * random.between(1, 2) : int64_t{bytes} * box.rows;
  box.row_stride = by_rows ? box.column_stride * box.columns + bytes * random.between(0, 3) : bytes;
  for (uint32_t i = 0; i < box.rows; ++i) {
    const std::string codes = random.bytes(row);
    launch.memory.write(box.from + i * box.row_bytes, codes.data(), codes.size());
    launch.memory.allow(box.from + i * box.row_bytes, row, Access::kRead);
    for (uint32_t j = 0; j < box.columns; ++j) {
      launch.memory.allow(box.to + static_cast<uint64_t>(i * box.row_stride + j * box.column_stride), bytes,
                          Access::kWriteOnce);
    }
  }
  const uint32_t scale_bytes = has_exponents ? 1 : 4;
  const uint32_t across = (box.first_column + box.columns - 1) / box.block_columns + 1;
  for (uint32_t i = 0; i <= (box.first_row + box.rows - 1) / box.block_rows; ++i) {
    for (uint32_t j = 0; j < across; ++j) {
      const uint64_t at = box.scales + (i * box.scales_in_row + j) * scale_bytes;
      const auto scale = has_exponents ? static_cast<uint32_t>(random.below(256)) : random_scale(random);
      launch.memory.write(at, &scale, scale_bytes);
      launch.memory.allow(at, scale_bytes, Access::kRead);
    }
  }
  return launch;
}

std::string failure_of(const simcuda::ptx::Kernel& kernel, Launch& launch, uint32_t blocks) {
  const BoxDequantization& box = launch.box;
  std::vector<std::byte> parameters;
  append(parameters, box);
  try {
    simcuda::ptx::run(kernel, {blocks, 1, 1}, {dcp_fast::cuda::kDequantizeThreads, 1, 1}, parameters, launch.memory);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  const Format& stored = kFormats.at(box.stored);
  const Format& destination = kFormats.at(box.destination);
  for (uint32_t i = 0; i < box.rows; ++i) {
    for (uint32_t j = 0; j < box.columns; ++j) {
      const uint64_t row = box.from + i * box.row_bytes;
      const uint32_t half = j + box.first_half;
      const uint32_t code = box.stored == Elements::kFloat4E2M1
                                ? read(launch.memory, row + half / 2, 1) >> half % 2 * 4 & 15
                            : box.stored == Elements::kFloat32 ? read(launch.memory, row + uint64_t{4} * j, 4)
                                                               : read(launch.memory, row + j, 1);
      const uint64_t scale =
          (box.first_row + i) / box.block_rows * box.scales_in_row + (box.first_column + j) / box.block_columns;
      const int scale_bytes = box.has_exponents != 0 ? 1 : 4;
      const double factor =
          scale_of(box.has_exponents != 0,
                   read(launch.memory, box.scales + scale * static_cast<uint64_t>(scale_bytes), scale_bytes));
      // A product of two float32 is exact in double.
      const double product = rounded(kFormats.at(Elements::kFloat32), decoded(stored, code) * factor);
      const double expected = rounded(destination, rounded(kFormats.at(box.target), product));
      const uint64_t to = box.to + static_cast<uint64_t>(i * box.row_stride + j * box.column_stride);
      const double actual = decoded(destination, read(launch.memory, to, destination.bits / 8));
      if (!is_same(actual, expected)) {
        return "row " + std::to_string(i) + ", column " + std::to_string(j) + ": " + std::to_string(actual) +
               " instead of " + std::to_string(expected);
      }
    }
  }
  return "";
}

}  // namespace

TEST_CASE("dequantization kernel: boxes of all formats, which together reach its instructions") {
  const Module module(kernel_text());
  const simcuda::ptx::Kernel& kernel = module.kernel("dcp_fast_dequantize");
  CHECK(kernel.parameter_bytes() == sizeof(BoxDequantization));
  Random random(1);
  const std::vector<Elements> results{Elements::kFloat32, Elements::kBFloat16, Elements::kFloat16};
  for (const auto& [stored, format] : kFormats) {
    if (stored == Elements::kBFloat16 || stored == Elements::kFloat16) continue;  // results alone
    for (const Elements target : results) {
      for (const Elements destination : results) {
        for (const bool has_exponents : {false, true}) {
          for (int i = 0; i < 6; ++i) {
            Launch launch = random_launch(random, stored, target, destination, has_exponents);
            CAPTURE(static_cast<int>(stored));
            CAPTURE(static_cast<int>(target));
            CAPTURE(static_cast<int>(destination));
            CAPTURE(has_exponents);
            REQUIRE(failure_of(kernel, launch, random.pick<uint32_t>({1, 2, 5})) == "");
          }
        }
      }
    }
  }
  const simcuda::ptx::Coverage coverage = kernel.coverage();
  // All but a branch for a format that does not exist.
  CHECK(coverage.executed >= coverage.total - 1);
}
