#include "copy/copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dcp_fast::copy {

namespace {

// Copies whole lines to an address that is a multiple of a line.
using CopyLines = void (*)(std::byte* to, const std::byte* from, std::size_t lines);

void copy_lines_plain(std::byte* to, const std::byte* from, std::size_t lines) { std::memcpy(to, from, lines * kLine); }

#if defined(__x86_64__)

void copy_lines_sse2(std::byte* to, const std::byte* from, std::size_t lines) {
  for (; lines > 0; --lines, to += kLine, from += kLine) {
    const auto* source = reinterpret_cast<const __m128i*>(from);
    auto* destination = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(source);
    const __m128i b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2);
    const __m128i d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(destination, a);
    _mm_stream_si128(destination + 1, b);
    _mm_stream_si128(destination + 2, c);
    _mm_stream_si128(destination + 3, d);
  }
}

__attribute__((target("avx2"))) void copy_lines_avx2(std::byte* to, const std::byte* from, std::size_t lines) {
  for (; lines > 0; --lines, to += kLine, from += kLine) {
    const auto* source = reinterpret_cast<const __m256i*>(from);
    auto* destination = reinterpret_cast<__m256i*>(to);
    const __m256i a = _mm256_loadu_si256(source);
    const __m256i b = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(destination, a);
    _mm256_stream_si256(destination + 1, b);
  }
}

__attribute__((target("avx512f"))) void copy_lines_avx512(std::byte* to, const std::byte* from, std::size_t lines) {
  for (; lines > 0; --lines, to += kLine, from += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
}

#elif defined(__aarch64__)

void copy_lines_neon(std::byte* to, const std::byte* from, std::size_t lines) {
  for (; lines > 0; --lines, to += kLine, from += kLine) {
    const auto* source = reinterpret_cast<const std::uint8_t*>(from);
    const uint8x16_t a = vld1q_u8(source);
    const uint8x16_t b = vld1q_u8(source + 16);
    const uint8x16_t c = vld1q_u8(source + 32);
    const uint8x16_t d = vld1q_u8(source + 48);
    // No intrinsic makes this store of a pair that is not to stay in the cache.
    __asm__ volatile("stnp %q1, %q2, [%0]\n\tstnp %q3, %q4, [%0, #32]"
                     :
                     : "r"(to), "w"(a), "w"(b), "w"(c), "w"(d)
                     : "memory");
  }
}

#endif

CopyLines copy_lines_with(Vectors vectors) {
  switch (vectors) {
#if defined(__x86_64__)
    case Vectors::kSse2:
      return copy_lines_sse2;
    case Vectors::kAvx2:
      return copy_lines_avx2;
    case Vectors::kAvx512:
      return copy_lines_avx512;
#elif defined(__aarch64__)
    case Vectors::kNeon:
      return copy_lines_neon;
#endif
    default:
      return copy_lines_plain;
  }
}

void stream(CopyLines copy_lines, std::byte* to, const std::byte* from, std::size_t size) {
  const std::size_t lead = std::min((kLine - reinterpret_cast<std::uintptr_t>(to) % kLine) % kLine, size);
  std::memcpy(to, from, lead);
  const std::size_t lines = (size - lead) / kLine;
  copy_lines(to + lead, from + lead, lines);
  const std::size_t done = lead + lines * kLine;
  std::memcpy(to + done, from + done, size - done);
}

}  // namespace

void stream_rows(Vectors vectors, void* to, std::ptrdiff_t to_stride, const void* from, std::ptrdiff_t from_stride,
                 std::size_t rows, std::size_t size) {
  const CopyLines copy_lines = copy_lines_with(vectors);
  for (std::size_t row = 0; row < rows; ++row) {
    const auto i = static_cast<std::ptrdiff_t>(row);
    stream(copy_lines, static_cast<std::byte*>(to) + i * to_stride,
           static_cast<const std::byte*>(from) + i * from_stride, size);
  }
  fence_streams();
}

void stream_unfenced(Vectors vectors, void* to, const void* from, std::size_t size) {
  stream(copy_lines_with(vectors), static_cast<std::byte*>(to), static_cast<const std::byte*>(from), size);
}

void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();  // elsewhere these stores are ordered like all others
#endif
}

void copy_bytes(void* to, const void* from, std::size_t size) { copy_rows(to, 0, from, 0, 1, size); }

void copy_rows(void* to, std::ptrdiff_t to_stride, const void* from, std::ptrdiff_t from_stride, std::size_t rows,
               std::size_t size) {
  if (size >= 4 * kLine && rows >= (kStreamedBytes + size - 1) / size) {
    return stream_rows(runnable_vectors().back(), to, to_stride, from, from_stride, rows, size);
  }
  for (std::size_t row = 0; row < rows; ++row) {
    const auto i = static_cast<std::ptrdiff_t>(row);
    std::memcpy(static_cast<std::byte*>(to) + i * to_stride, static_cast<const std::byte*>(from) + i * from_stride,
                size);
  }
}

}  // namespace dcp_fast::copy
