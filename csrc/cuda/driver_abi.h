// The part of the CUDA driver API that is used here, declared by hand: neither cuda.h nor a toolkit is needed to build,
// and one build serves every driver since CUDA 11. Names are the frozen symbols of libcuda.so.1, which the macros of
// newer cuda.h remap. tests/native/cuda/abi_check.cpp compares every signature with the official header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcp_fast::cuda {

using Result = int;   // CUresult
using Ordinal = int;  // CUdevice
using DeviceAddress = unsigned long long;
using ContextHandle = struct ContextObject*;
using StreamHandle = struct StreamObject*;
using EventHandle = struct EventObject*;
using ModuleHandle = struct ModuleObject*;
using FunctionHandle = struct FunctionObject*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kErrorOutOfMemory = 2;
inline constexpr Result kErrorNotReady = 600;
inline constexpr unsigned kHostRegisterPortable = 1;
inline constexpr unsigned kHostAllocPortable = 1;
inline constexpr int kCapabilityMajor = 75;  // of CUdevice_attribute
inline constexpr int kCapabilityMinor = 76;
inline constexpr int kCaptureNone = 0;  // of CUstreamCaptureStatus
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;

// X(name, parameters)
#define DCP_FAST_DRIVER_CALLS(X)                                                                           \
  X(cuInit, (unsigned))                                                                                    \
  X(cuGetErrorName, (Result, const char**))                                                                \
  X(cuGetErrorString, (Result, const char**))                                                              \
  X(cuDeviceGet, (Ordinal*, int))                                                                          \
  X(cuDeviceGetAttribute, (int*, int, Ordinal))                                                            \
  X(cuDeviceGetPCIBusId, (char*, int, Ordinal))                                                            \
  X(cuDevicePrimaryCtxRetain, (ContextHandle*, Ordinal))                                                   \
  X(cuDevicePrimaryCtxRelease_v2, (Ordinal))                                                               \
  X(cuCtxGetCurrent, (ContextHandle*))                                                                     \
  X(cuCtxSetCurrent, (ContextHandle))                                                                      \
  X(cuMemAlloc_v2, (DeviceAddress*, size_t))                                                               \
  X(cuMemFree_v2, (DeviceAddress))                                                                         \
  X(cuMemHostRegister_v2, (void*, size_t, unsigned))                                                       \
  X(cuMemHostUnregister, (void*))                                                                          \
  X(cuMemHostAlloc, (void**, size_t, unsigned))                                                            \
  X(cuMemFreeHost, (void*))                                                                                \
  X(cuMemcpyHtoDAsync_v2, (DeviceAddress, const void*, size_t, StreamHandle))                              \
  X(cuStreamCreate, (StreamHandle*, unsigned))                                                             \
  X(cuStreamDestroy_v2, (StreamHandle))                                                                    \
  X(cuStreamSynchronize, (StreamHandle))                                                                   \
  X(cuStreamWaitEvent, (StreamHandle, EventHandle, unsigned))                                              \
  X(cuStreamIsCapturing, (StreamHandle, int*))                                                             \
  X(cuEventCreate, (EventHandle*, unsigned))                                                               \
  X(cuEventDestroy_v2, (EventHandle))                                                                      \
  X(cuEventRecord, (EventHandle, StreamHandle))                                                            \
  X(cuEventQuery, (EventHandle))                                                                           \
  X(cuEventSynchronize, (EventHandle))                                                                     \
  X(cuEventElapsedTime, (float*, EventHandle, EventHandle))                                                \
  X(cuModuleLoadData, (ModuleHandle*, const void*))                                                        \
  X(cuModuleUnload, (ModuleHandle))                                                                        \
  X(cuModuleGetFunction, (FunctionHandle*, ModuleHandle, const char*))                                     \
  X(cuLaunchKernel, (FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
                     StreamHandle, void**, void**))

}  // namespace dcp_fast::cuda
