// Driver calls: the driver itself, devices, and contexts.
#include <cstdio>

#include "driver/call.h"
#include "driver/error_names.h"

namespace simcuda {

namespace {

// An Ampere-like device in what programs look at, but small, so that kernels must loop over what they are given.
bool attribute(CUdevice_attribute wanted, int device, int& value) {
  switch (wanted) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      value = 8;
      return true;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    case CU_DEVICE_ATTRIBUTE_INTEGRATED:
    case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID:
    case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
    case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
    case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS:
      value = 0;
      return true;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      value = device + 1;
      return true;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      value = 4;
      return true;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      value = 2;
      return true;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
      value = 1;
      return true;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      value = 32;
      return true;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      value = 1024;
      return true;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      value = 64;
      return true;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      value = 0x7fffffff;
      return true;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      value = 65535;
      return true;
    default:
      return false;
  }
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuInit(unsigned int flags) {
  return call("cuInit", Needs::kNothing, [&](Call& call) {
    require(flags == 0);
    call.simulator.initialize();
  });
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
  return call("cuDriverGetVersion", Needs::kNothing, [&](Call& call) {
    require(version != nullptr);
    *version = call.simulator.settings.driver_version;
  });
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** name) { return error_name(error, name); }

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) { return error_text(error, text); }

CUresult CUDAAPI cuDeviceGetCount(int* count) {
  return call("cuDeviceGetCount", Needs::kDriver, [&](Call& call) {
    require(count != nullptr);
    *count = static_cast<int>(call.simulator.contexts.size());
  });
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  return call("cuDeviceGet", Needs::kDriver, [&](Call& call) {
    require(device != nullptr);
    *device = call.simulator.context_of(ordinal).device;
  });
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute wanted, CUdevice device) {
  return call("cuDeviceGetAttribute", Needs::kDriver, [&](Call& call) {
    require(value != nullptr);
    if (!attribute(wanted, call.simulator.context_of(device).device, *value)) {
      call.simulator.reports.add("UNKNOWN: " + call.label() + ": attribute " + std::to_string(wanted));
      throw DriverError{CUDA_ERROR_INVALID_VALUE};
    }
  });
}

CUresult CUDAAPI cuDeviceGetPCIBusId(char* text, int capacity, CUdevice device) {
  return call("cuDeviceGetPCIBusId", Needs::kDriver, [&](Call& call) {
    require(text != nullptr && capacity > 0);
    std::snprintf(text, static_cast<size_t>(capacity), "0000:%02X:00.0", call.simulator.context_of(device).device + 1);
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* handle, CUdevice device) {
  return call("cuDevicePrimaryCtxRetain", Needs::kDriver, [&](Call& call) {
    require(handle != nullptr);
    Context& context = call.simulator.context_of(device);
    ++context.references;
    *handle = handle_of(&context);
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  return release_call("cuDevicePrimaryCtxRelease_v2", Needs::kDriver, [&](Call& call) {
    Context& context = call.simulator.context_of(device);
    if (context.references == 0) throw DriverError{CUDA_ERROR_INVALID_CONTEXT};
    if (context.references == 1) call.simulator.clear(call.lock, context);
    --context.references;
  });
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext handle) {
  return call("cuCtxSetCurrent", Needs::kDriver, [&](Call& call) {
    current_context() = handle == nullptr ? nullptr : context_of(call.simulator, handle);
  });
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* handle) {
  return call("cuCtxGetCurrent", Needs::kDriver, [&](Call&) {
    require(handle != nullptr);
    *handle = handle_of(current_context());
  });
}

CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  return call("cuCtxGetDevice", Needs::kContext, [&](Call& call) {
    require(device != nullptr);
    *device = call.context().device;
  });
}

CUresult CUDAAPI cuCtxSynchronize(void) {
  return call("cuCtxSynchronize", Needs::kContext, [&](Call& call) {
    const auto streams = call.context().streams;
    for (const auto& stream : streams) call.synchronize(call.context(), stream->tail(), stream->clock());
  });
}

}  // extern "C"

}  // namespace simcuda
