// Pinned memory: any device copies from it at full speed, without the processor.
#pragma once

#include <cstddef>

namespace dcp_fast::cuda {

class PinnedMemory {
 public:
  // Registers `size` bytes at `memory` with the driver: whole pages, which outlive this. Where the driver refuses
  // (limits of containers and WSL, confidential computing), it is asked for as many bytes of its own. Needs a current
  // context. Throws Error(kCudaRefused) if the driver refuses both, Error(kCuda).
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
