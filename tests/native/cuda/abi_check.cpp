// Compiled, not run, where the official header is: proves that driver_abi.h declares every call as cuda.h does.
// cuda.h comes first, so that its macros rename calls on both sides alike.
#include <cuda.h>
//
#include <type_traits>

#include "cuda/driver.h"

namespace {

namespace ours = dcp_fast::cuda;

// The official types as ours.
template <typename T>
struct Ours {
  using Type = T;
};
template <>
struct Ours<CUresult> {
  using Type = ours::Result;
};
template <>
struct Ours<CUcontext> {
  using Type = ours::ContextHandle;
};
template <>
struct Ours<CUstream> {
  using Type = ours::StreamHandle;
};
template <>
struct Ours<CUevent> {
  using Type = ours::EventHandle;
};
template <>
struct Ours<CUmodule> {
  using Type = ours::ModuleHandle;
};
template <>
struct Ours<CUfunction> {
  using Type = ours::FunctionHandle;
};
template <>
struct Ours<CUdevice_attribute> {
  using Type = int;
};
template <>
struct Ours<CUstreamCaptureStatus> {
  using Type = int;
};
template <>
struct Ours<CUstreamCaptureMode> {
  using Type = int;
};
template <>
struct Ours<CUfunction_attribute> {
  using Type = int;
};
template <typename T>
struct Ours<T*> {
  using Type = typename Ours<T>::Type*;
};

template <typename Function>
struct Signature;
template <typename Return, typename... Parameters>
struct Signature<Return (*)(Parameters...)> {
  using Type = typename Ours<Return>::Type (*)(typename Ours<Parameters>::Type...);
};

#define DCP_FAST_COMPARE(name, parameters) \
  static_assert(std::is_same_v<Signature<decltype(&::name)>::Type, decltype(ours::Driver::name)>, #name " differs");
DCP_FAST_DRIVER_CALLS(DCP_FAST_COMPARE)
#undef DCP_FAST_COMPARE

static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kErrorOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(ours::kErrorNotReady == CUDA_ERROR_NOT_READY);
static_assert(ours::kHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(ours::kHostAllocPortable == CU_MEMHOSTALLOC_PORTABLE);
static_assert(ours::kCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(ours::kCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(ours::kFunctionRegisters == CU_FUNC_ATTRIBUTE_NUM_REGS);
static_assert(ours::kCaptureRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
#define DCP_FAST_COMPARE(name, number) static_assert(name == (number), #name " differs");
DCP_FAST_BREAKING_RESULTS(DCP_FAST_COMPARE)
#undef DCP_FAST_COMPARE
static_assert(ours::kCaptureNone == CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(sizeof(CUdevice_attribute) == sizeof(int) && sizeof(CUstreamCaptureStatus) == sizeof(int));
static_assert(ours::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(ours::kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);

}  // namespace
