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
inline constexpr int kFunctionRegisters = 4;  // of CUfunction_attribute
inline constexpr int kCaptureNone = 0;        // of CUstreamCaptureStatus
inline constexpr int kCaptureRelaxed = 2;     // of CUstreamCaptureMode

// Results after which a context is of no use any more, or a capture: nothing else is tried then.
// X(result, its number)
#define DCP_FAST_BREAKING_RESULTS(X)             \
  X(CUDA_ERROR_DEINITIALIZED, 4)                 \
  X(CUDA_ERROR_ECC_UNCORRECTABLE, 214)           \
  X(CUDA_ERROR_NVLINK_UNCORRECTABLE, 220)        \
  X(CUDA_ERROR_ILLEGAL_ADDRESS, 700)             \
  X(CUDA_ERROR_LAUNCH_TIMEOUT, 702)              \
  X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709)        \
  X(CUDA_ERROR_ASSERT, 710)                      \
  X(CUDA_ERROR_HARDWARE_STACK_ERROR, 714)        \
  X(CUDA_ERROR_ILLEGAL_INSTRUCTION, 715)         \
  X(CUDA_ERROR_MISALIGNED_ADDRESS, 716)          \
  X(CUDA_ERROR_INVALID_ADDRESS_SPACE, 717)       \
  X(CUDA_ERROR_INVALID_PC, 718)                  \
  X(CUDA_ERROR_LAUNCH_FAILED, 719)               \
  X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900)  \
  X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901)  \
  X(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, 904)     \
  X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905)    \
  X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906)     \
  X(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, 908) \
  X(CUDA_ERROR_UNKNOWN, 999)
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
  X(cuMemcpyDtoDAsync_v2, (DeviceAddress, DeviceAddress, size_t, StreamHandle))                            \
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
  X(cuFuncGetAttribute, (int*, int, FunctionHandle))                                                       \
  X(cuThreadExchangeStreamCaptureMode, (int*))                                                             \
  X(cuLaunchKernel, (FunctionHandle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
                     StreamHandle, void**, void**))

}  // namespace dcp_fast::cuda
