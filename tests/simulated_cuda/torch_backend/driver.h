// The driver calls of the torch backend, found by dlopen as the engine finds its own, so that both speak to the same
// simulated driver. Nothing is loaded or initialised before the first call.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstddef>
#include <cstdint>

namespace torch_backend {

constexpr int kSuccess = 0;
constexpr int kOutOfMemory = 2;
constexpr int kNotReady = 600;

constexpr unsigned kDisableTiming = 2;  // CU_EVENT_DISABLE_TIMING

constexpr size_t kMaxDevices = 64;

using Handle = void*;            // CUcontext, CUstream or CUevent
using DeviceAddress = uint64_t;  // CUdeviceptr

// The second column is the symbol of libcuda.so.1, not the macro of cuda.h, which newer headers point elsewhere.
#define TORCH_BACKEND_DRIVER_FUNCTIONS(F)                                                 \
  F(init, "cuInit", unsigned)                                                             \
  F(device_count, "cuDeviceGetCount", int*)                                               \
  F(device_attribute, "cuDeviceGetAttribute", int*, int, int)                             \
  F(retain_context, "cuDevicePrimaryCtxRetain", Handle*, int)                             \
  F(set_context, "cuCtxSetCurrent", Handle)                                               \
  F(get_context, "cuCtxGetCurrent", Handle*)                                              \
  F(synchronize_context, "cuCtxSynchronize")                                              \
  F(allocate, "cuMemAlloc_v2", DeviceAddress*, size_t)                                    \
  F(free, "cuMemFree_v2", DeviceAddress)                                                  \
  F(allocate_host, "cuMemHostAlloc", void**, size_t, unsigned)                            \
  F(free_host, "cuMemFreeHost", void*)                                                    \
  F(copy_to_device, "cuMemcpyHtoDAsync_v2", DeviceAddress, const void*, size_t, Handle)   \
  F(copy_to_host, "cuMemcpyDtoHAsync_v2", void*, DeviceAddress, size_t, Handle)           \
  F(copy_on_device, "cuMemcpyDtoDAsync_v2", DeviceAddress, DeviceAddress, size_t, Handle) \
  F(set_bytes, "cuMemsetD8Async", DeviceAddress, unsigned char, size_t, Handle)           \
  F(create_stream, "cuStreamCreate", Handle*, unsigned)                                   \
  F(synchronize_stream, "cuStreamSynchronize", Handle)                                    \
  F(query_stream, "cuStreamQuery", Handle)                                                \
  F(wait_for_event, "cuStreamWaitEvent", Handle, Handle, unsigned)                        \
  F(create_event, "cuEventCreate", Handle*, unsigned)                                     \
  F(destroy_event, "cuEventDestroy_v2", Handle)                                           \
  F(record_event, "cuEventRecord", Handle, Handle)                                        \
  F(query_event, "cuEventQuery", Handle)                                                  \
  F(synchronize_event, "cuEventSynchronize", Handle)                                      \
  F(elapsed_time, "cuEventElapsedTime", float*, Handle, Handle)                           \
  F(pointer_attribute, "cuPointerGetAttribute", void*, int, DeviceAddress)                \
  F(error_name, "cuGetErrorName", int, const char**)

struct Driver {
#define TORCH_BACKEND_MEMBER(member, symbol, ...) int (*member)(__VA_ARGS__) = nullptr;
  TORCH_BACKEND_DRIVER_FUNCTIONS(TORCH_BACKEND_MEMBER)
#undef TORCH_BACKEND_MEMBER
  // Of the simulator alone: they tell its race detector what this library does to host memory.
  void (*host_write)(const void*, size_t, const char*) = nullptr;
  void (*host_read)(const void*, size_t, const char*) = nullptr;
};

// Loads the library that DCP_FAST_LIBCUDA names and initialises it, once. Throws if either fails.
const Driver& driver();

// Whether this process was forked from one that had initialised the driver, which is then of no use here.
bool in_bad_fork();

// Throws torch's AcceleratorError for a status other than success.
void check(int status, const char* function);

// The number of devices; throws as driver() does.
c10::DeviceIndex device_count();

bool has_context(c10::DeviceIndex device);

// Makes the primary context of a device current on this thread, and the one before it again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(c10::DeviceIndex device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  Handle before_ = nullptr;
};

// A stream's id in torch is its handle in the driver; 0 is the legacy default stream in both.
inline Handle handle(c10::StreamId stream) { return reinterpret_cast<Handle>(stream); }

}  // namespace torch_backend
