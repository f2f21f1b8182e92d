// Page-aligned memory that bytes pass through when they cannot be read straight into place.
#pragma once

#include <cstddef>

namespace dcp_fast::io {

// The page of sources that read whole pages alone: what direct reads (O_DIRECT) ask of offsets, lengths and addresses
// on every common file system and block device.
inline constexpr size_t kPageBytes = 4096;

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  ~AlignedBuffer();
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // At least `size` bytes; keeps what it has if that is enough, else replaces it (contents are lost).
  // Throws std::bad_alloc.
  std::byte* reserve(size_t size);

 private:
  std::byte* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace dcp_fast::io
