#include "cuda/pinned.h"

#include "cuda/driver.h"

namespace dcp_fast::cuda {

PinnedMemory::PinnedMemory(std::byte* memory, size_t size) : data_(memory) {
  const Result result = driver().cuMemHostRegister_v2(memory, size, kHostRegisterPortable);
  if (result == kSuccess) return;
  if (!is_refusal(result)) check("cuMemHostRegister_v2", result);
  void* allocated = nullptr;
  const Result second = driver().cuMemHostAlloc(&allocated, size, kHostAllocPortable);
  if (second != kSuccess) require("cuMemHostRegister_v2", result);  // the first refusal is the cause
  data_ = static_cast<std::byte*>(allocated);
  registered_ = false;
}

PinnedMemory::~PinnedMemory() {
  static_cast<void>(registered_ ? driver().cuMemHostUnregister(data_) : driver().cuMemFreeHost(data_));
}

}  // namespace dcp_fast::cuda
