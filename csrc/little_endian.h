// Integers as pickles and zip archives hold them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dcp_fast {

// The unsigned integer of `width` bytes, at most 8, the lowest one first.
inline uint64_t from_little_endian(const void* bytes, size_t width) {
  uint64_t value = 0;
  if (width > 0) std::memcpy(&value, bytes, width);  // of nothing there need not be an address
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

// The same in two's complement, as LONG1 of pickles has it. Of no bytes: 0.
inline int64_t signed_from_little_endian(const void* bytes, size_t width) {
  uint64_t value = from_little_endian(bytes, width);
  if (width > 0 && width < 8 && (value >> (8 * width - 1) & 1) != 0) value |= ~uint64_t{0} << (8 * width);
  return static_cast<int64_t>(value);
}

}  // namespace dcp_fast
