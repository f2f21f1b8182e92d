#include "copy/scaled_steps.h"

#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "copy/copy.h"
#include "copy/cpu.h"
#include "copy/numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define DCP_FAST_SCALED __attribute__((target("avx2,f16c")))
#endif

namespace dcp_fast::copy {

namespace {

constexpr float kMostScale = 1e30F;

#if defined(__x86_64__)

constexpr int64_t kVector = 8;  // float32 at once

// The upper halves of 16 float32.
DCP_FAST_SCALED inline void store_upper(void* to, __m256i first, __m256i second) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

// Rounds to a bfloat16 in the upper half, as BFloat16::from_float32 does what is no NaN.
DCP_FAST_SCALED inline __m256i round_upper(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// FP8 as a float16: the sign stays where it is, and the rest goes some bits to the right. That makes the number too
// small by a factor. Some bit patterns are no such float16.
struct E4M3Fn {
  using Number = Float8E4M3Fn;
  static constexpr int kShift = 1;
  static constexpr float kRebias = 256;
  DCP_FAST_SCALED static __m128i find_special(__m128i bytes) {
    return _mm_cmpeq_epi8(_mm_or_si128(bytes, _mm_set1_epi8(-0x80)), _mm_set1_epi8(-1));  // a NaN
  }
};

struct E5M2 {
  using Number = Float8E5M2;
  static constexpr int kShift = 0;
  static constexpr float kRebias = 1;
  DCP_FAST_SCALED static __m128i find_special(__m128i bytes) {
    const __m128i highest = _mm_set1_epi8(0x7c);
    return _mm_cmpeq_epi8(_mm_and_si128(bytes, highest), highest);  // an infinity or a NaN
  }
};

struct E4M3Fnuz {
  using Number = Float8E4M3Fnuz;
  static constexpr int kShift = 1;
  static constexpr float kRebias = 128;
  DCP_FAST_SCALED static __m128i find_special(__m128i bytes) {
    return _mm_cmpeq_epi8(bytes, _mm_set1_epi8(-0x80));  // a NaN
  }
};

struct E5M2Fnuz {
  using Number = Float8E5M2Fnuz;
  static constexpr int kShift = 0;
  static constexpr float kRebias = 0.5;
  DCP_FAST_SCALED static __m128i find_special(__m128i bytes) {
    // A NaN, or one of the largest numbers.
    return _mm_or_si128(E4M3Fnuz::find_special(bytes), E5M2::find_special(bytes));
  }
};

constexpr int64_t bytes_of(StepTarget target) { return target == StepTarget::kFloat32 ? 4 : 2; }

template <typename Stored, StepTarget kTarget>
void step_one(std::byte* to, std::byte from, float scale) {
  const float value = float_of(Stored::Number::to_float32(std::to_integer<uint8_t>(from))) * scale;
  if constexpr (kTarget == StepTarget::kFloat32) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    const uint16_t bits = kTarget == StepTarget::kBFloat16 ? BFloat16::from_float32<0xffff>(bits_of(value))
                                                           : Float16::from_float32(bits_of(value));
    std::memcpy(to, &bits, sizeof(bits));
  }
}

// Stores 16 results.
template <StepTarget kTarget>
DCP_FAST_SCALED inline void store_rounded(std::byte* to, __m256 first, __m256 second) {
  if constexpr (kTarget == StepTarget::kFloat32) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), first);
    _mm256_storeu_ps(reinterpret_cast<float*>(to) + kVector, second);
  } else if constexpr (kTarget == StepTarget::kBFloat16) {
    store_upper(to, round_upper(first), round_upper(second));
  } else {
    auto* out = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(out, _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128(out + 1, _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

template <typename Stored>
DCP_FAST_SCALED inline __m256i to_halves(__m128i bytes) {
  const __m256i upper = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
  if constexpr (Stored::kShift == 0) return upper;
  return _mm256_and_si256(_mm256_srai_epi16(upper, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
}

// A scale that is made smaller might lose bits, but no number of FP8 does.
template <typename Stored>
constexpr bool kRebiasesNumbers = Stored::kRebias < 1;

template <typename Stored>
DCP_FAST_SCALED inline __m256 to_floats(__m128i halves) {
  const __m256 numbers = _mm256_cvtph_ps(halves);
  if constexpr (kRebiasesNumbers<Stored>) return _mm256_mul_ps(numbers, _mm256_set1_ps(Stored::kRebias));
  return numbers;
}

template <typename Stored, StepTarget kTarget>
DCP_FAST_SCALED void step_scaled(void* to, const std::byte* from, int64_t count, float scale) {
  constexpr int64_t kTo = bytes_of(kTarget);
  auto* out = static_cast<std::byte*>(to);
  const __m256 factor = _mm256_set1_ps(kRebiasesNumbers<Stored> ? scale : scale * Stored::kRebias);
  int64_t i = 0;
  for (; i + 2 * kVector <= count; i += 2 * kVector) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    if (_mm_movemask_epi8(Stored::find_special(bytes)) != 0) {
      for (int64_t j = i; j < i + 2 * kVector; ++j) step_one<Stored, kTarget>(out + j * kTo, from[j], scale);
      continue;
    }
    const __m256i halves = to_halves<Stored>(bytes);
    const __m256 first = to_floats<Stored>(_mm256_castsi256_si128(halves));
    const __m256 second = to_floats<Stored>(_mm256_extracti128_si256(halves, 1));
    store_rounded<kTarget>(out + i * kTo, _mm256_mul_ps(first, factor), _mm256_mul_ps(second, factor));
  }
  for (; i < count; ++i) step_one<Stored, kTarget>(out + i * kTo, from[i], scale);
}

template <typename Stored>
ScaledStep scaled_step(StepTarget target) {
  switch (target) {
    case StepTarget::kFloat32:
      return step_scaled<Stored, StepTarget::kFloat32>;
    case StepTarget::kBFloat16:
      return step_scaled<Stored, StepTarget::kBFloat16>;
    default:
      return step_scaled<Stored, StepTarget::kFloat16>;
  }
}

bool has_instructions() {
  const Vectors best = runnable_vectors().back();
  return best == Vectors::kAvx2 || best == Vectors::kAvx512;
}

#endif

// What each element of MXFP4 becomes with each scale, in a format of 16 bits: its bytes, one beside the other.
struct Mxfp4Numbers {
  alignas(kLine) std::array<std::array<uint8_t, 16>, 256> lower;
  alignas(kLine) std::array<std::array<uint8_t, 16>, 256> upper;
};

template <typename Format>
const Mxfp4Numbers& mxfp4_numbers() {
  static const Mxfp4Numbers numbers = [] {
    Mxfp4Numbers made;
    for (std::size_t exponent = 0; exponent < 256; ++exponent) {
      const float scale = float_of(Float8E8M0::to_float32(static_cast<uint8_t>(exponent)));
      for (std::size_t code = 0; code < 16; ++code) {
        const float product = float_of(Float4E2M1::to_float32(static_cast<uint8_t>(code))) * scale;
        const uint32_t bits = Format::from_float32(bits_of(product));
        made.lower[exponent][code] = static_cast<uint8_t>(bits);
        made.upper[exponent][code] = static_cast<uint8_t>(bits >> 8);
      }
    }
    return made;
  }();
  return numbers;
}

// A product is exact in the upper half of a float32, so that those of bfloat16 do for float32 too.
template <typename Format, bool kToFloat32>
void step_mxfp4(void* to, const std::byte* from, const std::byte* exponents, int64_t blocks) {
  using Result = std::conditional_t<kToFloat32, uint32_t, uint16_t>;
  const Mxfp4Numbers& numbers = mxfp4_numbers<Format>();
  auto* out = static_cast<std::byte*>(to);
  for (int64_t block = 0; block < blocks; ++block) {
    const auto exponent = std::to_integer<std::size_t>(exponents[block]);
    for (int64_t i = 0; i < kMxfp4Block; ++i, out += sizeof(Result)) {
      const auto byte = std::to_integer<std::size_t>(from[(block * kMxfp4Block + i) / 2]);
      const std::size_t code = i % 2 == 0 ? byte & 15 : byte >> 4;
      const uint32_t bits = numbers.lower[exponent][code] | static_cast<uint32_t>(numbers.upper[exponent][code]) << 8;
      const auto result = static_cast<Result>(kToFloat32 ? bits << 16 : bits);
      std::memcpy(out, &result, sizeof(result));
    }
  }
}

#if defined(__x86_64__)

DCP_FAST_SCALED inline __m256i load_twice(const std::array<uint8_t, 16>& bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes.data())));
}

// The same. All 16 numbers of a scale fit into a register, in which elements look up their bytes.
template <typename Format, bool kToFloat32>
DCP_FAST_SCALED void step_mxfp4_by_vectors(void* to, const std::byte* from, const std::byte* exponents,
                                           int64_t blocks) {
  const Mxfp4Numbers& numbers = mxfp4_numbers<Format>();
  auto* out = static_cast<__m256i*>(to);
  const __m128i half = _mm_set1_epi8(15);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto exponent = std::to_integer<std::size_t>(exponents[i]);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kMxfp4Block / 2));
    const __m128i low = _mm_and_si128(bytes, half);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), half);
    const __m256i in_order = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
    // Elements 0 to 7 and 16 to 23, then the others: bytes are unpacked within each half of a register.
    const __m256i codes = _mm256_permute4x64_epi64(in_order, 0xd8);
    const __m256i lower = _mm256_shuffle_epi8(load_twice(numbers.lower[exponent]), codes);
    const __m256i upper = _mm256_shuffle_epi8(load_twice(numbers.upper[exponent]), codes);
    for (const __m256i results : {_mm256_unpacklo_epi8(lower, upper), _mm256_unpackhi_epi8(lower, upper)}) {
      if constexpr (kToFloat32) {
        const __m256i first = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(results));
        const __m256i second = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(results, 1));
        _mm256_storeu_si256(out++, _mm256_slli_epi32(first, 16));
        _mm256_storeu_si256(out++, _mm256_slli_epi32(second, 16));
      } else {
        _mm256_storeu_si256(out++, results);
      }
    }
  }
}

#endif

template <typename Format, bool kToFloat32>
BlocksStep mxfp4_step() {
#if defined(__x86_64__)
  if (has_instructions()) return step_mxfp4_by_vectors<Format, kToFloat32>;
#endif
  return step_mxfp4<Format, kToFloat32>;
}

}  // namespace

#if defined(__x86_64__)
ScaledStep find_scaled_step(checkpoint::DType stored, StepTarget target) {
  if (!has_instructions()) return nullptr;
  if (stored == checkpoint::dtype_by_name("float8_e4m3fn")) return scaled_step<E4M3Fn>(target);
  if (stored == checkpoint::dtype_by_name("float8_e5m2")) return scaled_step<E5M2>(target);
  if (stored == checkpoint::dtype_by_name("float8_e4m3fnuz")) return scaled_step<E4M3Fnuz>(target);
  if (stored == checkpoint::dtype_by_name("float8_e5m2fnuz")) return scaled_step<E5M2Fnuz>(target);
  return nullptr;
}
#else
ScaledStep find_scaled_step(checkpoint::DType, StepTarget) { return nullptr; }
#endif

BlocksStep find_mxfp4_step(StepTarget target) {
  switch (target) {
    case StepTarget::kFloat32:
      return mxfp4_step<BFloat16, true>();
    case StepTarget::kBFloat16:
      return mxfp4_step<BFloat16, false>();
    default:
      return mxfp4_step<Float16, false>();
  }
}

// With these the scale can be rebiased, and no product is a NaN but that of one.
bool can_step(float scale) { return std::fabs(scale) < kMostScale; }

}  // namespace dcp_fast::copy
