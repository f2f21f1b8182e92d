#include "copy/scaled_steps.h"

#include <cmath>
#include <cstring>

#include "copy/cpu.h"
#include "copy/numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define DCP_FAST_SCALED __attribute__((target("avx2,f16c")))
#endif

namespace dcp_fast::copy {

namespace {

// What E4M3 is too small by, where its bits are taken for those of a float16.
constexpr float kRebias = 256;
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

template <bool kToBFloat16>
void step_e4m3_one(std::byte* to, std::byte from, float scale) {
  const float value = float_of(Float8E4M3Fn::to_float32(std::to_integer<uint8_t>(from))) * scale;
  if constexpr (kToBFloat16) {
    const uint16_t bits = BFloat16::from_float32<0xffff>(bits_of(value));
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

template <bool kToBFloat16>
DCP_FAST_SCALED void step_e4m3(void* to, const std::byte* from, int64_t count, float scale) {
  constexpr int64_t kTo = kToBFloat16 ? 2 : 4;
  auto* out = static_cast<std::byte*>(to);
  const __m256 factor = _mm256_set1_ps(scale * kRebias);
  const __m128i sign = _mm_set1_epi8(-0x80);
  int64_t i = 0;
  for (; i + 2 * kVector <= count; i += 2 * kVector) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    if (_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_or_si128(bytes, sign), _mm_set1_epi8(-1))) != 0) {  // a NaN
      for (int64_t j = i; j < i + 2 * kVector; ++j) step_e4m3_one<kToBFloat16>(out + j * kTo, from[j], scale);
      continue;
    }
    // The sign stays where it is; the rest goes one bit to the right.
    const __m256i shifted = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8), 1);
    const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m256 first = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), factor);
    const __m256 second = _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), factor);
    if constexpr (kToBFloat16) {
      store_upper(out + i * kTo, round_upper(first), round_upper(second));
    } else {
      _mm256_storeu_ps(reinterpret_cast<float*>(out + i * kTo), first);
      _mm256_storeu_ps(reinterpret_cast<float*>(out + i * kTo) + kVector, second);
    }
  }
  for (; i < count; ++i) step_e4m3_one<kToBFloat16>(out + i * kTo, from[i], scale);
}

// A number of E2M1 is exact in the upper half of a float32, whose two bytes are looked up. It still is when it is
// scaled.
template <bool kToBFloat16>
DCP_FAST_SCALED void step_mxfp4(void* to, const std::byte* from, const std::byte* exponents, int64_t blocks) {
  constexpr int64_t kTo = kToBFloat16 ? 2 : 4;
  auto* out = static_cast<std::byte*>(to);
  const __m128i upper = _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41, -0x41, -0x41, -0x40,
                                      -0x40, -0x40, -0x40);
  const __m128i lower =
      _mm_setr_epi8(0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40, 0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40);
  const __m128i half = _mm_set1_epi8(15);
  for (int64_t i = 0; i < blocks; ++i) {
    const __m256 factor = _mm256_set1_ps(float_of(Float8E8M0::to_float32(std::to_integer<uint8_t>(exponents[i]))));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kMxfp4Block / 2));
    const __m128i low = _mm_and_si128(bytes, half);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), half);
    for (const __m128i codes : {_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)}) {
      const __m128i upper_bytes = _mm_shuffle_epi8(upper, codes);
      const __m128i lower_bytes = _mm_shuffle_epi8(lower, codes);
      const __m256i first = _mm256_cvtepu16_epi32(_mm_unpacklo_epi8(lower_bytes, upper_bytes));
      const __m256i second = _mm256_cvtepu16_epi32(_mm_unpackhi_epi8(lower_bytes, upper_bytes));
      const __m256 values = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), factor);
      const __m256 others = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(second, 16)), factor);
      if constexpr (kToBFloat16) {
        store_upper(out, _mm256_castps_si256(values), _mm256_castps_si256(others));
      } else {
        _mm256_storeu_ps(reinterpret_cast<float*>(out), values);
        _mm256_storeu_ps(reinterpret_cast<float*>(out) + kVector, others);
      }
      out += 2 * kVector * kTo;
    }
  }
}

bool has_instructions() {
  const Vectors best = runnable_vectors().back();
  return best == Vectors::kAvx2 || best == Vectors::kAvx512;
}

#endif

}  // namespace

#if defined(__x86_64__)
ScaledStep find_e4m3_step(bool to_bfloat16) {
  if (!has_instructions()) return nullptr;
  return to_bfloat16 ? step_e4m3<true> : step_e4m3<false>;
}
BlocksStep find_mxfp4_step(bool to_bfloat16) {
  if (!has_instructions()) return nullptr;
  return to_bfloat16 ? step_mxfp4<true> : step_mxfp4<false>;
}
#else
ScaledStep find_e4m3_step(bool) { return nullptr; }
BlocksStep find_mxfp4_step(bool) { return nullptr; }
#endif

// With these the scale of E4M3 can be rebiased, and no product is a NaN but that of one.
bool can_step(float scale) { return std::fabs(scale) < kMostScale; }

}  // namespace dcp_fast::copy
