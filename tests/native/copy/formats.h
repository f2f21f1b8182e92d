// An independent definition of number formats, by values and not by bits: a number becomes the nearest one that its new
// format has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dcp_fast::testing::formats {

inline uint64_t bits_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline uint64_t bits_of(double value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct Float {
  int exponent;  // bits of it
  int mantissa;
  int bias;
  bool ieee;  // the highest exponent is for infinities and NaNs
  bool fnuz;  // the pattern of negative zero is the only NaN
  int bits() const { return 1 + exponent + mantissa; }
  uint64_t sign() const { return uint64_t{1} << (exponent + mantissa); }
  bool is_nan(uint64_t bits) const {
    if (fnuz) return bits == sign();
    const uint64_t magnitude = bits & (sign() - 1);
    if (!ieee) return magnitude == sign() - 1;
    return magnitude > ((uint64_t{1} << exponent) - 1) << mantissa;
  }
};

inline const std::map<std::string, Float>& floats() {
  static const std::map<std::string, Float> kFloats{
      {"float16", {5, 10, 15, true, false}},      {"bfloat16", {8, 7, 127, true, false}},
      {"float8_e4m3fn", {4, 3, 7, false, false}}, {"float8_e4m3fnuz", {4, 3, 8, false, true}},
      {"float8_e5m2", {5, 2, 15, true, false}},   {"float8_e5m2fnuz", {5, 2, 16, false, true}},
      {"float32", {8, 23, 127, true, false}},     {"float64", {11, 52, 1023, true, false}},
  };
  return kFloats;
}

inline bool is_float(const std::string& dtype) { return floats().count(dtype) != 0; }

inline int int_bits(const std::string& dtype) {
  return dtype == "int8" || dtype == "uint8" ? 8 : dtype == "int16" ? 16 : dtype == "int32" ? 32 : 64;
}

// Of a pattern that is no NaN.
inline double value_of(const Float& format, uint64_t bits) {
  const double sign = (bits & format.sign()) != 0 ? -1 : 1;
  const uint64_t mantissa = bits & ((uint64_t{1} << format.mantissa) - 1);
  const auto exponent = static_cast<int>((bits & (format.sign() - 1)) >> format.mantissa);
  if (format.ieee && exponent == (1 << format.exponent) - 1) return sign * std::numeric_limits<double>::infinity();
  const double fraction = std::ldexp(static_cast<double>(mantissa), -format.mantissa);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - format.bias);
  return sign * std::ldexp(1 + fraction, exponent - format.bias);
}

// The numbers of a format of at most 16 bits that are not negative, in the order of their patterns, which is theirs.
// The last one is the first that is too large.
inline const std::vector<double>& finite_values(const std::string& dtype) {
  static std::map<std::string, std::vector<double>> known;
  std::vector<double>& values = known[dtype];
  if (!values.empty()) return values;
  Float format = floats().at(dtype);
  const uint64_t end =
      format.ieee ? ((uint64_t{1} << format.exponent) - 1) << format.mantissa : format.sign() - (format.fnuz ? 0 : 1);
  format.ieee = false;
  for (uint64_t bits = 0; bits < end; ++bits) values.push_back(value_of(format, bits));
  values.push_back(end == format.sign() ? std::ldexp(1, (1 << format.exponent) - format.bias) : value_of(format, end));
  return values;
}

// What a pattern of one format becomes in another one.
class Converter {
 public:
  Converter(const std::string& from, const std::string& to)
      : from_(is_float(from) ? &floats().at(from) : nullptr),
        to_(is_float(to) ? &floats().at(to) : nullptr),
        from_bits_(from_ != nullptr ? from_->bits() : int_bits(from)),
        to_bits_(to_ != nullptr ? to_->bits() : int_bits(to)),
        is_signed_(from != "uint8"),
        is_bfloat16_(to == "bfloat16"),
        values_(to_ != nullptr && to_bits_ <= 16 ? &finite_values(to) : nullptr) {}

  // nullopt: any NaN.
  std::optional<uint64_t> operator()(uint64_t bits, bool ones_nan) const {
    if (from_ == nullptr) {
      if (is_signed_ && from_bits_ < 64 && (bits >> (from_bits_ - 1)) != 0) bits |= ~uint64_t{0} << from_bits_;
      if (to_ == nullptr) return to_bits_ == 64 ? bits : bits & ((uint64_t{1} << to_bits_) - 1);
      const auto value = static_cast<int64_t>(bits);
      return to_bits_ == 64 ? bits_of(static_cast<double>(value)) : of_float(static_cast<float>(value));
    }
    if (from_->is_nan(bits)) {
      if (is_bfloat16_) return ones_nan ? 0xffff : 0x7fc0;
      return std::nullopt;
    }
    const double value = value_of(*from_, bits);
    return to_bits_ == 64 ? bits_of(value) : of_float(static_cast<float>(value));
  }

  bool is_nan(uint64_t result) const { return to_ != nullptr && to_->is_nan(result); }

 private:
  uint64_t of_float(float value) const { return to_bits_ == 32 ? bits_of(value) : nearest(value); }

  // The nearest number, of two equally near ones that with an even pattern.
  uint64_t nearest(double value) const {
    const std::vector<double>& values = *values_;
    const double magnitude = std::fabs(value);
    const auto above = std::lower_bound(values.begin(), values.end(), magnitude);
    auto bits = static_cast<uint64_t>(above - values.begin());
    if (above == values.end()) {
      bits = values.size() - 1;
    } else if (above != values.begin()) {
      const double low = *(above - 1);
      const bool tie = magnitude - low == *above - magnitude;
      if (magnitude - low < *above - magnitude || (tie && (bits - 1) % 2 == 0)) --bits;
    }
    if (to_->fnuz && bits == values.size() - 1) return to_->sign();  // NaN
    if (to_->fnuz && bits == 0) return 0;
    return bits | (std::signbit(value) ? to_->sign() : 0);
  }

  const Float* from_;  // null: an integer
  const Float* to_;
  int from_bits_;
  int to_bits_;
  bool is_signed_;
  bool is_bfloat16_;
  const std::vector<double>* values_;
};

}  // namespace dcp_fast::testing::formats
