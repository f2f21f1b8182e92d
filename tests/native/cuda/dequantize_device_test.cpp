// The kernel that dequantizes, on whatever driver there is, against what the host makes of the same bytes.

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "copy/dequantize.h"
#include "copy/numbers.h"
#include "cuda/dequantize_launch.h"
#include "device_load.h"
#include "doctest/doctest.h"
#include "test_device.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::dtype_by_name;
using copy::Quantization;
using copy::Scales;

namespace {

float decoded(const std::string& dtype, uint8_t code) {
  const uint32_t bits = dtype == "float8_e4m3fn"     ? copy::Float8E4M3Fn::to_float32(code)
                        : dtype == "float8_e5m2"     ? copy::Float8E5M2::to_float32(code)
                        : dtype == "float8_e4m3fnuz" ? copy::Float8E4M3Fnuz::to_float32(code)
                                                     : copy::Float8E5M2Fnuz::to_float32(code);
  return copy::float_of(bits);
}

// Codes of numbers: a NaN may have other bits on a device.
std::string random_codes(Random& random, const std::string& dtype, size_t count) {
  std::string codes = random.bytes(count);
  if (dtype.empty()) return codes;
  for (char& code : codes) {
    if (!std::isfinite(decoded(dtype, static_cast<uint8_t>(code)))) code = 0x11;
  }
  return codes;
}

std::string random_scales(Random& random, Scales kind, size_t count) {
  std::string scales;
  for (size_t i = 0; i < count; ++i) {
    if (kind == Scales::kE8M0) {
      scales += static_cast<char>(random.between(0, 254));
      continue;
    }
    const float scale =
        static_cast<float>(random.between(-1000, 1000)) * random.pick<float>({1.0F / 64, 1e-30F, 1e20F});
    scales.append(reinterpret_cast<const char*>(&scale), sizeof(scale));
  }
  return scales;
}

struct Case {
  Quantization quantization;
  Scales scales;
  checkpoint::DType stored;
  checkpoint::DType target;
  checkpoint::DType destination;
  copy::QuantizedBox box;
  std::string from;
  std::string factors;
  std::string before;
  size_t margin = 0;  // bytes of the destination before the box
};

Case random_case(Random& random) {
  Case made;
  const std::string dtype =
      random.pick<const char*>({"", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"});
  const bool is_mxfp4 = dtype.empty();
  made.quantization = is_mxfp4 ? Quantization::kMxfp4 : Quantization::kElements;
  made.scales = is_mxfp4 || random.chance(20) ? Scales::kE8M0 : Scales::kFloat32;
  made.stored = is_mxfp4 ? checkpoint::kUnknownDType : dtype_by_name(dtype);
  const std::vector<const char*> results{"float32", "bfloat16", "float16"};
  made.target = dtype_by_name(random.pick(results));
  made.destination = random.chance(70) ? made.target : dtype_by_name(random.pick(results));
  copy::QuantizedBox& box = made.box;
  box.rows = random.between(1, 40);
  box.columns = random.pick<int64_t>({1, 31, 128, 200, 700});
  box.block_rows = is_mxfp4 ? 1 : random.pick<int64_t>({1, 7, 128});
  box.block_columns = is_mxfp4 ? 32 : box.block_rows;
  box.first_row = random.between(0, box.block_rows - 1);
  box.first_column = random.between(0, box.block_columns - 1);
  box.scales_stride = (box.first_column + box.columns - 1) / box.block_columns + 1;
  box.from_stride = is_mxfp4 ? box.scales_stride * box.block_columns / 2 : box.columns;
  made.from = random_codes(random, dtype, static_cast<size_t>(box.rows * box.from_stride));
  const int64_t down = (box.first_row + box.rows - 1) / box.block_rows + 1;
  made.factors = random_scales(random, made.scales, static_cast<size_t>(down * box.scales_stride));
  const int64_t bytes = checkpoint::info(made.destination).itemsize;
  const bool by_rows = random.chance(70);
  box.to_column_stride = by_rows ? bytes * random.between(1, 2) : bytes * box.rows;
  box.to_row_stride = by_rows ? box.to_column_stride * box.columns + bytes * random.between(0, 3) : bytes;
  made.margin = static_cast<size_t>(bytes * random.between(0, 9));
  made.before.assign(made.margin + static_cast<size_t>(box.rows * box.columns * bytes * 2 + box.rows * bytes * 3), '#');
  return made;
}

}  // namespace

TEST_CASE("device: boxes are dequantized as on the host") {
  const Clean clean;
  Random random(300);
  for (int i = 0; i < 60; ++i) {
    CAPTURE(i);
    const Case made = random_case(random);
    copy::QuantizedBox box = made.box;
    box.from = reinterpret_cast<const std::byte*>(made.from.data());
    box.scales = reinterpret_cast<const std::byte*>(made.factors.data());
    std::string expected = made.before;
    box.to = data_of(expected) + made.margin;
    const auto how =
        copy::find_dequantization(made.quantization, made.scales, made.stored, made.target, made.destination,
                                  box.to_column_stride == checkpoint::info(made.destination).itemsize);
    REQUIRE(how);
    copy::dequantize(*how, box);

    const int ordinal = random.chance(50) ? 0 : other_device();
    Gpu gpu(kMiB, 65536);
    const DeviceBytes from(ordinal, made.from);
    const DeviceBytes factors(ordinal, made.factors);
    const DeviceBytes to(ordinal, made.before);
    box.from = from.address();
    box.scales = factors.address();
    box.to = to.address() + made.margin;
    const cuda::DequantizedFormats formats{*cuda::stored_elements(made.quantization, made.stored),
                                           *cuda::resulting_elements(made.target),
                                           *cuda::resulting_elements(made.destination), made.scales};
    gpu.ring.device(ordinal).dequantize(gpu.streams[ordinal].get(), {cuda::describe(formats, box)});
    gpu.streams[ordinal].synchronize();
    CHECK(to.download() == expected);
    CHECK(gpu.ring.take_stats().launches == 1);
  }
}
