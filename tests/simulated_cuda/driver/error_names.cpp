#include "driver/error_names.h"

#include <algorithm>
#include <iterator>

namespace simcuda {

namespace {

struct Named {
  CUresult result;
  const char* name;
  const char* text;
};

#define SIMCUDA_NAMED(result, text) {result, #result, text}

constexpr Named kNames[] = {
    SIMCUDA_NAMED(CUDA_SUCCESS, "no error"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    SIMCUDA_NAMED(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    SIMCUDA_NAMED(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    SIMCUDA_NAMED(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    SIMCUDA_NAMED(CUDA_ERROR_STUB_LIBRARY, "CUDA driver is a stub library"),
    SIMCUDA_NAMED(CUDA_ERROR_DEVICE_UNAVAILABLE, "CUDA-capable device(s) is/are busy or unavailable"),
    SIMCUDA_NAMED(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    SIMCUDA_NAMED(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    SIMCUDA_NAMED(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    SIMCUDA_NAMED(CUDA_ERROR_UNSUPPORTED_LIMIT, "limit is not supported on this architecture"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    SIMCUDA_NAMED(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain."),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_SOURCE, "device kernel image is invalid"),
    SIMCUDA_NAMED(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    SIMCUDA_NAMED(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    SIMCUDA_NAMED(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    SIMCUDA_NAMED(CUDA_ERROR_NOT_READY, "device not ready"),
    SIMCUDA_NAMED(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    SIMCUDA_NAMED(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    SIMCUDA_NAMED(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    SIMCUDA_NAMED(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "cannot set while device is active in this process"),
    SIMCUDA_NAMED(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    SIMCUDA_NAMED(CUDA_ERROR_ASSERT, "device-side assert triggered"),
    SIMCUDA_NAMED(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,
                  "part or all of the requested memory range is already mapped"),
    SIMCUDA_NAMED(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    SIMCUDA_NAMED(CUDA_ERROR_HARDWARE_STACK_ERROR, "hardware stack error"),
    SIMCUDA_NAMED(CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    SIMCUDA_NAMED(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_ADDRESS_SPACE, "operation not supported on global/shared address space"),
    SIMCUDA_NAMED(CUDA_ERROR_INVALID_PC, "invalid program counter"),
    SIMCUDA_NAMED(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    SIMCUDA_NAMED(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    SIMCUDA_NAMED(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    SIMCUDA_NAMED(CUDA_ERROR_UNKNOWN, "unknown error"),
};

#undef SIMCUDA_NAMED

const Named* find(CUresult error) {
  const auto* found =
      std::find_if(std::begin(kNames), std::end(kNames), [=](const Named& named) { return named.result == error; });
  return found == std::end(kNames) ? nullptr : found;
}

}  // namespace

CUresult error_name(CUresult error, const char** name) {
  const Named* named = find(error);
  *name = named == nullptr ? nullptr : named->name;
  return named == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult error_text(CUresult error, const char** text) {
  const Named* named = find(error);
  *text = named == nullptr ? nullptr : named->text;
  return named == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

}  // namespace simcuda
