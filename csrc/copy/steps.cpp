#include "copy/steps.h"

#include <cstring>

#include "copy/numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define DCP_FAST_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace dcp_fast::copy {

namespace {

// How one element is converted.

template <Format>
struct Number;  // `Bits`, and to_float32 and from_float32 on bits
template <>
struct Number<Format::kFloat16> : Float16 {};
template <>
struct Number<Format::kBFloat16> : BFloat16 {};
template <>
struct Number<Format::kBFloat16OnesNan> : BFloat16 {
  static Bits from_float32(uint32_t bits) { return BFloat16::from_float32<0xffff>(bits); }
};
template <>
struct Number<Format::kFloat8E4M3Fn> : Float8E4M3Fn {};
template <>
struct Number<Format::kFloat8E4M3Fnuz> : Float8E4M3Fnuz {};
template <>
struct Number<Format::kFloat8E5M2> : Float8E5M2 {};
template <>
struct Number<Format::kFloat8E5M2Fnuz> : Float8E5M2Fnuz {};

template <Format kFrom>
struct Decode {
  using From = typename Number<kFrom>::Bits;
  using To = uint32_t;
  static To apply(From bits) { return Number<kFrom>::to_float32(bits); }
};
template <Format kTo>
struct Encode {
  using From = uint32_t;
  using To = typename Number<kTo>::Bits;
  static To apply(From bits) { return Number<kTo>::from_float32(bits); }
};
// As the language converts: integers wrap around, floats are rounded as the processor is told, to nearest.
template <typename FromType, typename ToType>
struct Cast {
  using From = FromType;
  using To = ToType;
  static To apply(From value) { return static_cast<To>(value); }
};

// torch copies a bool as one, whatever byte stands for it.
struct Truth {
  using From = uint8_t;
  using To = uint8_t;
  static To apply(From value) { return static_cast<To>(value != 0); }
};

// The loop, for all instructions.

template <typename Element>
inline __attribute__((always_inline)) void convert(void* to, const void* from, std::size_t count) {
  using From = typename Element::From;
  using To = typename Element::To;
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  for (std::size_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, in + i * sizeof(From), sizeof(From));
    const To result = Element::apply(value);
    std::memcpy(out + i * sizeof(To), &result, sizeof(To));
  }
}

template <typename Element>
struct Loop {
  // For the oldest processor of the architecture.
  static void baseline(void* __restrict to, const void* __restrict from, std::size_t count) {
    convert<Element>(to, from, count);
  }
#if defined(__x86_64__)
  DCP_FAST_AVX2 static void avx2(void* __restrict to, const void* __restrict from, std::size_t count) {
    convert<Element>(to, from, count);
  }
#endif
};

#if defined(__x86_64__)

// The processor's own conversions of float16 are faster than what compilers make of ours.
constexpr std::size_t kHalves = 8;

template <>
DCP_FAST_AVX2 void Loop<Decode<Format::kFloat16>>::avx2(void* __restrict to, const void* __restrict from,
                                                        std::size_t count) {
  auto* out = static_cast<float*>(to);
  const auto* in = static_cast<const uint16_t*>(from);
  std::size_t i = 0;
  for (; i + kHalves <= count; i += kHalves) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  convert<Decode<Format::kFloat16>>(out + i, in + i, count - i);
}

template <>
DCP_FAST_AVX2 void Loop<Encode<Format::kFloat16>>::avx2(void* __restrict to, const void* __restrict from,
                                                        std::size_t count) {
  auto* out = static_cast<uint16_t*>(to);
  const auto* in = static_cast<const float*>(from);
  std::size_t i = 0;
  for (; i + kHalves <= count; i += kHalves) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
  convert<Encode<Format::kFloat16>>(out + i, in + i, count - i);
}

// A float16 has the exponent and the mantissa of either format of FP8 among its own, so that its conversion to float32
// does most of theirs. One of E4M3 has another bias then, and another NaN.
constexpr std::size_t kBytes = 16;

DCP_FAST_AVX2 inline void store_halves(float* to, __m256i halves) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
  _mm256_storeu_ps(to + kHalves, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
}
DCP_FAST_AVX2 inline __m256 rebias_e4m3(__m128i halves) {
  constexpr float kRebias = 256;
  constexpr float kNan = 480;  // what the bits of the NaN would be as a number
  const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(kRebias));
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value);
  const __m256 is_nan = _mm256_cmp_ps(magnitude, _mm256_set1_ps(kNan), _CMP_EQ_OQ);
  return _mm256_or_ps(value, _mm256_and_ps(is_nan, _mm256_castsi256_ps(_mm256_set1_epi32(0x7ff00000))));
}

template <>
DCP_FAST_AVX2 void Loop<Decode<Format::kFloat8E5M2>>::avx2(void* __restrict to, const void* __restrict from,
                                                           std::size_t count) {
  auto* out = static_cast<float*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  std::size_t i = 0;
  for (; i + kBytes <= count; i += kBytes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    store_halves(out + i, _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
  }
  convert<Decode<Format::kFloat8E5M2>>(out + i, in + i, count - i);
}

template <>
DCP_FAST_AVX2 void Loop<Decode<Format::kFloat8E4M3Fn>>::avx2(void* __restrict to, const void* __restrict from,
                                                             std::size_t count) {
  auto* out = static_cast<float*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  std::size_t i = 0;
  for (; i + kBytes <= count; i += kBytes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    // The sign stays where it is; the rest goes one bit to the right.
    const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
    const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    _mm256_storeu_ps(out + i, rebias_e4m3(_mm256_castsi256_si128(halves)));
    _mm256_storeu_ps(out + i + kHalves, rebias_e4m3(_mm256_extracti128_si256(halves, 1)));
  }
  convert<Decode<Format::kFloat8E4M3Fn>>(out + i, in + i, count - i);
}

#endif

template <typename Element>
Step choose(Vectors vectors) {
#if defined(__x86_64__)
  // Wider vectors gain little: the memory is what limits conversions (docs/benchmarks.md).
  if (vectors == Vectors::kAvx2 || vectors == Vectors::kAvx512) return Loop<Element>::avx2;
#endif
  static_cast<void>(vectors);
  return Loop<Element>::baseline;
}

template <typename From>
Step choose_cast(Format to, Vectors vectors) {
  switch (to) {
    case Format::kInt8:
    case Format::kUint8:
      return choose<Cast<From, uint8_t>>(vectors);
    case Format::kInt16:
      return choose<Cast<From, uint16_t>>(vectors);
    case Format::kInt32:
      return choose<Cast<From, uint32_t>>(vectors);
    case Format::kInt64:
      return choose<Cast<From, uint64_t>>(vectors);
    case Format::kFloat32:
      return choose<Cast<From, float>>(vectors);
    case Format::kFloat64:
      return choose<Cast<From, double>>(vectors);
    default:
      return nullptr;
  }
}

Step choose_encode(Format to, Vectors vectors) {
  switch (to) {
    case Format::kFloat64:
      return choose<Cast<float, double>>(vectors);
    case Format::kFloat16:
      return choose<Encode<Format::kFloat16>>(vectors);
    case Format::kBFloat16:
      return choose<Encode<Format::kBFloat16>>(vectors);
    case Format::kBFloat16OnesNan:
      return choose<Encode<Format::kBFloat16OnesNan>>(vectors);
    case Format::kFloat8E4M3Fnuz:
      return choose<Encode<Format::kFloat8E4M3Fnuz>>(vectors);
    case Format::kFloat8E5M2:
      return choose<Encode<Format::kFloat8E5M2>>(vectors);
    case Format::kFloat8E5M2Fnuz:
      return choose<Encode<Format::kFloat8E5M2Fnuz>>(vectors);
    default:
      return nullptr;  // integers: what becomes of numbers that are too large is not defined
  }
}

Step choose_decode(Format from, Vectors vectors) {
  switch (from) {
    case Format::kFloat64:
      return choose<Cast<double, float>>(vectors);
    case Format::kFloat16:
      return choose<Decode<Format::kFloat16>>(vectors);
    case Format::kBFloat16:
      return choose<Decode<Format::kBFloat16>>(vectors);
    case Format::kFloat8E4M3Fn:
      return choose<Decode<Format::kFloat8E4M3Fn>>(vectors);
    case Format::kFloat8E4M3Fnuz:
      return choose<Decode<Format::kFloat8E4M3Fnuz>>(vectors);
    case Format::kFloat8E5M2:
      return choose<Decode<Format::kFloat8E5M2>>(vectors);
    case Format::kFloat8E5M2Fnuz:
      return choose<Decode<Format::kFloat8E5M2Fnuz>>(vectors);
    default:
      return nullptr;
  }
}

}  // namespace

Step find_step(Format from, Format to, Vectors vectors) {
  switch (from) {
    case Format::kInt8:
      return choose_cast<int8_t>(to, vectors);
    case Format::kUint8:
      return choose_cast<uint8_t>(to, vectors);
    case Format::kInt16:
      return choose_cast<int16_t>(to, vectors);
    case Format::kInt32:
      return choose_cast<int32_t>(to, vectors);
    case Format::kInt64:
      return choose_cast<int64_t>(to, vectors);
    case Format::kFloat32:
      return choose_encode(to, vectors);
    case Format::kBool:
      return to == Format::kBool ? choose<Truth>(vectors) : nullptr;
    default:
      return to == Format::kFloat32 ? choose_decode(from, vectors) : nullptr;
  }
}

}  // namespace dcp_fast::copy
