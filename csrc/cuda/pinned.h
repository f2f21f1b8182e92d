// Host memory that any device copies from at full speed and without the host's doing.
#pragma once

#include <cstddef>

namespace dcp_fast::cuda {

class PinnedMemory {
 public:
  // Registers `size` bytes at `memory`, whole pages that outlive this, with the driver. Where it does not let that be
  // (limits of containers and WSL, confidential computing), it is asked for as many bytes of its own. Needs a current
  // context. Throws Error(kCudaRefused) if it refuses both, Error(kCuda).
  PinnedMemory(std::byte* memory, size_t size);
  // Needs a current context too.
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  bool registered_ = true;  // else it is the driver's own
};

}  // namespace dcp_fast::cuda
