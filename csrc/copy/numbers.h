// The number formats of tensors: what a bit pattern of one means in another. All of this is defined without branches,
// so that compilers make vector code of loops over it.
//
// A float of 8 or 16 bits is converted through float32, as torch does. NaNs get the bits that torch gives them.
#pragma once

#include <cstdint>
#include <cstring>

// nvcc compiles these functions for GPUs too, so that they do the same there.
#ifdef __CUDACC__
#define DCP_FAST_ANYWHERE __host__ __device__
#else
#define DCP_FAST_ANYWHERE
#endif

namespace dcp_fast::copy {

DCP_FAST_ANYWHERE inline uint32_t bits_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
DCP_FAST_ANYWHERE inline float float_of(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline constexpr uint32_t kFloat32Sign = 0x80000000;
inline constexpr uint32_t kFloat32Infinity = 0x7f800000;
inline constexpr int kFloat32Mantissa = 23;
inline constexpr int kFloat32Bias = 127;

DCP_FAST_ANYWHERE constexpr uint32_t exponent_of_float32(int exponent) {
  return static_cast<uint32_t>(exponent + kFloat32Bias) << kFloat32Mantissa;
}

// `condition ? yes : no`, which compilers would rather make a branch of, and no vector code then.
DCP_FAST_ANYWHERE constexpr uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0 - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// Rounds away the lower bits, to nearest, ties to even.
template <int kBits>
DCP_FAST_ANYWHERE constexpr uint32_t round_off(uint32_t bits) {
  return (bits + ((1U << (kBits - 1)) - 1) + ((bits >> kBits) & 1)) >> kBits;
}

// The upper half of a float32.
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint16_t kNan = 0x7fc0;  // of either sign

  DCP_FAST_ANYWHERE static uint32_t to_float32(Bits bits) { return static_cast<uint32_t>(bits) << 16; }

  template <uint16_t kNanBits = kNan>
  DCP_FAST_ANYWHERE static Bits from_float32(uint32_t bits) {
    const bool is_nan = (bits & ~kFloat32Sign) > kFloat32Infinity;
    return static_cast<Bits>(is_nan ? kNanBits : round_off<16>(bits));
  }
};

// Which bit patterns are no finite numbers.
enum class Specials {
  kIeee,          // the highest exponent: infinities and NaNs
  kNan,           // all bits but the sign
  kNegativeZero,  // that of negative zero is a NaN
  kNone
};

// A float of a sign, an exponent and a mantissa, in this order, with subnormal numbers.
template <typename BitsType, int kExponent, int kMantissa, int kBias, Specials kSpecials>
struct SmallFloat {
  using Bits = BitsType;
  static constexpr int kShift = kFloat32Mantissa - kMantissa;
  static constexpr uint32_t kSign = 1U << (kExponent + kMantissa);
  static constexpr uint32_t kHighestExponent = ((1U << kExponent) - 1) << kMantissa;
  static constexpr uint32_t kQuiet = 1U << (kMantissa - 1);  // the bit of a NaN that raises no exception
  static constexpr uint32_t kRebias = static_cast<uint32_t>(kFloat32Bias - kBias) << kFloat32Mantissa;
  static constexpr uint32_t kLeastNormal = exponent_of_float32(1 - kBias);
  static constexpr int kLeastExponent = 1 - kBias - kMantissa;  // of the smallest subnormal number

  DCP_FAST_ANYWHERE static uint32_t to_float32(Bits bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & kSign) << (31 - kExponent - kMantissa);
    const uint32_t magnitude = bits & (kSign - 1);
    // A subnormal number is an integer, times the smallest one.
    const float least = float_of(exponent_of_float32(kLeastExponent));
    const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * least);
    const uint32_t normal = (magnitude << kShift) + kRebias;
    const uint32_t finite = select(magnitude < (1U << kMantissa), subnormal, normal) | sign;
    if constexpr (kSpecials == Specials::kIeee) {
      const uint32_t quiet = magnitude > kHighestExponent ? kQuiet : 0;
      return magnitude >= kHighestExponent ? sign | kFloat32Infinity | ((magnitude | quiet) << kShift) : finite;
    } else if constexpr (kSpecials == Specials::kNan) {
      return magnitude == kSign - 1 ? sign | kFloat32Infinity | (magnitude << kShift) : finite;
    } else if constexpr (kSpecials == Specials::kNegativeZero) {
      return bits == kSign ? kFloat32Infinity + 1 : finite;
    } else {
      return finite;
    }
  }

  // Not for kNan: what becomes of numbers that are too large depends on the version of torch.
  DCP_FAST_ANYWHERE static Bits from_float32(uint32_t bits) {
    static_assert(kSpecials != Specials::kNan);
    constexpr uint32_t kTooLarge =
        kSpecials == Specials::kIeee ? exponent_of_float32(kBias + 1) : exponent_of_float32((1 << kExponent) - kBias);
    const uint32_t magnitude = bits & ~kFloat32Sign;
    const uint32_t sign = (bits & kFloat32Sign) >> (31 - kExponent - kMantissa);
    const uint32_t normal = round_off<kShift>(magnitude - kRebias);
    // The processor rounds a subnormal number when it is added to one whose last bit is the smallest such number.
    constexpr uint32_t kAnchor = exponent_of_float32(kLeastExponent + kFloat32Mantissa);
    const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kAnchor)) - kAnchor;
    const uint32_t rounded = select(magnitude < kLeastNormal, subnormal, normal);
    if constexpr (kSpecials == Specials::kIeee) {
      const uint32_t number = magnitude >= kTooLarge ? kHighestExponent : rounded;
      // Those of 16 bits keep what they can of a NaN's other bits.
      const uint32_t nan =
          kMantissa > 2 ? kHighestExponent | kQuiet | ((magnitude >> kShift) & (kQuiet - 1)) : kSign - 1;
      return static_cast<Bits>((magnitude > kFloat32Infinity ? nan : number) | sign);
    } else {
      const uint32_t number = magnitude >= kTooLarge ? kSign : rounded;
      return static_cast<Bits>(number == 0 ? 0 : number | sign);
    }
  }
};

using Float16 = SmallFloat<uint16_t, 5, 10, 15, Specials::kIeee>;
using Float8E5M2 = SmallFloat<uint8_t, 5, 2, 15, Specials::kIeee>;
using Float8E4M3Fn = SmallFloat<uint8_t, 4, 3, 7, Specials::kNan>;
using Float8E5M2Fnuz = SmallFloat<uint8_t, 5, 2, 16, Specials::kNegativeZero>;
using Float8E4M3Fnuz = SmallFloat<uint8_t, 4, 3, 8, Specials::kNegativeZero>;
using Float4E2M1 = SmallFloat<uint8_t, 2, 1, 1, Specials::kNone>;  // in the lower half of a byte

// A power of two, by its exponent. It has no sign and no zero.
struct Float8E8M0 {
  using Bits = uint8_t;
  static constexpr uint32_t kNan = 0xff;

  DCP_FAST_ANYWHERE static uint32_t to_float32(Bits bits) {
    constexpr uint32_t kHalf = 1U << (kFloat32Mantissa - 1);
    // The least one is a subnormal float32.
    const uint32_t number = select(bits == 0, kHalf, static_cast<uint32_t>(bits) << kFloat32Mantissa);
    return number | select(bits == kNan, kHalf, 0);
  }
};

}  // namespace dcp_fast::copy
