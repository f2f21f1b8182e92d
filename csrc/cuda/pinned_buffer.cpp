#include "cuda/pinned_buffer.h"

#include "error.h"

namespace dcp_fast::cuda {

PinnedBuffer::PinnedBuffer(size_t size, int device) : size_(size), context_(device) {
  const CurrentContext current(context_);
  const size_t pages = (size + io::kPageBytes - 1) / io::kPageBytes * io::kPageBytes;
  pinned_ = std::make_unique<PinnedMemory>(memory_.reserve(pages), pages);
}

PinnedBuffer::~PinnedBuffer() {
  try {
    const CurrentContext current(context_);
    pinned_.reset();
  } catch (const Error&) {
    // The context is broken, and nothing of it can be freed before the process ends.
    static_cast<void>(pinned_.release());  // NOLINT(bugprone-unused-return-value)
  }
}

}  // namespace dcp_fast::cuda
