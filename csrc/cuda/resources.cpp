#include "cuda/resources.h"

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

DeviceMemory allocate(size_t size) {
  DeviceAddress address = 0;
  DCP_FAST_CUDA(cuMemAlloc_v2, &address, size);
  return DeviceMemory(address);
}

PrimaryContext::PrimaryContext(int ordinal) {
  DCP_FAST_CUDA(cuDeviceGet, &device_, ordinal);
  DCP_FAST_CUDA(cuDevicePrimaryCtxRetain, &handle_, device_);
}

PrimaryContext::~PrimaryContext() { static_cast<void>(driver().cuDevicePrimaryCtxRelease_v2(device_)); }

CurrentContext::CurrentContext(const PrimaryContext& context) {
  DCP_FAST_CUDA(cuCtxGetCurrent, &before_);
  DCP_FAST_CUDA(cuCtxSetCurrent, context.get());
  static_cast<void>(driver().cuThreadExchangeStreamCaptureMode(&capture_mode_));
}

CurrentContext::~CurrentContext() {
  static_cast<void>(driver().cuThreadExchangeStreamCaptureMode(&capture_mode_));
  static_cast<void>(driver().cuCtxSetCurrent(before_));
}

}  // namespace dcp_fast::cuda
