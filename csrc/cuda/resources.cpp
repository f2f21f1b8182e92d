#include "cuda/resources.h"

#include <sys/mman.h>

namespace dcp_fast::cuda {

Stream make_stream() {
  StreamHandle handle = nullptr;
  DCP_FAST_CUDA(cuStreamCreate, &handle, kStreamNonBlocking);
  return Stream(handle);
}

Event make_event() {
  EventHandle handle = nullptr;
  DCP_FAST_CUDA(cuEventCreate, &handle, kEventBlockingSync);
  return Event(handle);
}

Module load_module(const char* text) {
  ModuleHandle handle = nullptr;
  DCP_FAST_CUDA(cuModuleLoadData, &handle, text);
  return Module(handle);
}

DeviceMemory allocate(size_t size) {
  DeviceAddress address = 0;
  DCP_FAST_CUDA(cuMemAlloc_v2, &address, size);
  return DeviceMemory(address);
}

PinnedMemory::PinnedMemory(size_t size) {
  std::byte* data = buffer_.reserve(size);
#ifdef MADV_DONTFORK
  // After a fork the first write to a page may move it away from where devices read it.
  static_cast<void>(::madvise(data, size, MADV_DONTFORK));
#endif
  DCP_FAST_CUDA(cuMemHostRegister_v2, data, size, kHostRegisterPortable);
  data_ = data;
}

PinnedMemory::~PinnedMemory() { static_cast<void>(driver().cuMemHostUnregister(data_)); }

PrimaryContext::PrimaryContext(int ordinal) {
  DCP_FAST_CUDA(cuDeviceGet, &device_, ordinal);
  DCP_FAST_CUDA(cuDevicePrimaryCtxRetain, &handle_, device_);
}

PrimaryContext::~PrimaryContext() { static_cast<void>(driver().cuDevicePrimaryCtxRelease_v2(device_)); }

CurrentContext::CurrentContext(const PrimaryContext& context) {
  DCP_FAST_CUDA(cuCtxGetCurrent, &before_);
  DCP_FAST_CUDA(cuCtxSetCurrent, context.get());
}

CurrentContext::~CurrentContext() { static_cast<void>(driver().cuCtxSetCurrent(before_)); }

}  // namespace dcp_fast::cuda
