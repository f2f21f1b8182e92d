// Pinned memory that belongs to nobody's ring.
#pragma once

#include <cstddef>
#include <memory>

#include "cuda/pinned.h"
#include "cuda/resources.h"
#include "io/buffer.h"

namespace dcp_fast::cuda {

class PinnedBuffer {
 public:
  // Throws Error(kCudaRefused), Error(kCuda), std::bad_alloc.
  PinnedBuffer(size_t size, int device);
  // No device may use it any more.
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  std::byte* data() const { return pinned_->data(); }
  size_t size() const { return size_; }

 private:
  const size_t size_;
  io::AlignedBuffer memory_;  // unless the driver gave memory of its own
  const PrimaryContext context_;
  std::unique_ptr<PinnedMemory> pinned_;
};

}  // namespace dcp_fast::cuda
