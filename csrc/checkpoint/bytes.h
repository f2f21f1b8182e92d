// A bounds-checked view of bytes in memory with little-endian reads. Reading past the end never touches memory:
// it returns zero and makes `ok()` false, so that a parser can check once after a group of reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "little_endian.h"

namespace dcp_fast::checkpoint {

class Bytes {
 public:
  Bytes() = default;
  Bytes(const std::byte* data, size_t size) : data_(data), size_(size) {}

  size_t size() const { return size_; }
  const std::byte* data() const { return data_; }
  size_t position() const { return position_; }
  bool ok() const { return ok_; }

  void seek(size_t position) {
    ok_ = ok_ && position <= size_;
    if (ok_) position_ = position;
  }
  void skip(size_t count) {
    if (take(count)) position_ += count;
  }

  uint8_t u8() { return static_cast<uint8_t>(unsigned_integer(1)); }
  uint16_t u16() { return static_cast<uint16_t>(unsigned_integer(2)); }
  uint32_t u32() { return static_cast<uint32_t>(unsigned_integer(4)); }
  uint64_t u64() { return unsigned_integer(8); }

  std::string_view text(size_t count) {
    if (!take(count)) return {};
    const std::string_view view(reinterpret_cast<const char*>(data_) + position_, count);
    position_ += count;
    return view;
  }

  // Up to and past the next newline, which is left out; not ok if there is none.
  std::string_view line() {
    const auto* start = reinterpret_cast<const char*>(data_) + position_;
    const void* newline = ok_ && position_ < size_ ? std::memchr(start, '\n', size_ - position_) : nullptr;
    if (newline == nullptr) {
      ok_ = false;
      return {};
    }
    const auto count = static_cast<size_t>(static_cast<const char*>(newline) - start);
    position_ += count + 1;
    return {start, count};
  }

 private:
  bool take(size_t count) {
    ok_ = ok_ && count <= size_ - position_;
    return ok_;
  }
  uint64_t unsigned_integer(size_t width) {
    if (!take(width)) return 0;
    const uint64_t value = from_little_endian(data_ + position_, width);
    position_ += width;
    return value;
  }

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  size_t position_ = 0;
  bool ok_ = true;
};

}  // namespace dcp_fast::checkpoint
