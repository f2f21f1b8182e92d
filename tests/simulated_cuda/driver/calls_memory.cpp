// Driver calls: device memory, pinned host memory, and what pointers are.
#include <sys/mman.h>

#include <cstring>

#include "driver/call.h"

namespace simcuda {

namespace {

// The program may use the memory for something else from here on.
void expect_no_work(Call& call, History& history, const char* kind) {
  if (const Work* work = call.simulator.races.not_waited_for(history)) {
    call.simulator.reports.add(std::string(kind) + ": " + call.label() + " before the host waited for " + work->label);
  }
}

void forget_host(Call& call, const HostRange& range, HostOrigin origin) {
  const uint64_t begin = range.range.begin;
  if (range.origin != origin) throw DriverError{CUDA_ERROR_INVALID_VALUE};
  // Any device may have work that touches it.
  call.simulator.drain(call.lock, nullptr);
  HostRange* still = call.simulator.host.at(reinterpret_cast<const void*>(begin));
  if (still == nullptr) throw DriverError{CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED};
  expect_no_work(call, still->history, "USE-AFTER-UNREGISTER");
  call.simulator.host.remove(*still);
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  return call("cuMemAlloc_v2", Needs::kContext, [&](Call& call) {
    require(address != nullptr && bytes > 0);
    const Settings& settings = call.simulator.settings;
    const Allocation* allocation = call.context().memory.allocate(bytes, settings.memory_bytes, settings.poison);
    if (allocation == nullptr) throw DriverError{CUDA_ERROR_OUT_OF_MEMORY};
    *address = allocation->range.begin;
  });
}

CUresult CUDAAPI cuMemFree_v2(CUdeviceptr address) {
  return release_call("cuMemFree_v2", Needs::kContext, [&](Call& call) {
    if (address == 0) return;
    Context* owner = call.simulator.owner_of(address);
    require(owner != nullptr);
    // Only once kernels have run is known what they touched.
    call.simulator.drain(call.lock, owner);
    Allocation* allocation = owner->memory.find(address);
    if (allocation == nullptr || allocation->range.begin != address) {
      call.simulator.reports.add(owner->memory.what_is_wrong_with({address, address + 1}) + ", in " + call.label());
      throw DriverError{CUDA_ERROR_INVALID_VALUE};
    }
    expect_no_work(call, allocation->history, "USE-AFTER-FREE");
    owner->memory.free(*allocation);
  });
}

CUresult CUDAAPI cuMemHostAlloc(void** address, size_t bytes, unsigned int flags) {
  return call("cuMemHostAlloc", Needs::kContext, [&](Call& call) {
    constexpr unsigned int kKnown =
        CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
    require(address != nullptr && bytes > 0 && (flags & ~kKnown) == 0);
    call.take(call.simulator.settings.pin_seconds_per_byte * static_cast<double>(bytes), call.simulator.pinning);
    void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw DriverError{CUDA_ERROR_OUT_OF_MEMORY};
    std::memset(memory, kPoison, bytes);
    const auto begin = reinterpret_cast<uint64_t>(memory);
    // With unified addressing all contexts take it for pinned.
    call.simulator.host.add(
        {{begin, begin + bytes}, HostOrigin::kAllocated, Portability::kPortable, &call.context(), {}});
    *address = memory;
  });
}

CUresult CUDAAPI cuMemFreeHost(void* address) {
  return release_call("cuMemFreeHost", Needs::kContext, [&](Call& call) {
    const HostRange* range = call.simulator.host.at(address);
    require(range != nullptr);
    const size_t bytes = range->range.size();
    forget_host(call, *range, HostOrigin::kAllocated);
    ::munmap(address, bytes);
  });
}

CUresult CUDAAPI cuMemHostRegister_v2(void* address, size_t bytes, unsigned int flags) {
  return call("cuMemHostRegister_v2", Needs::kContext, [&](Call& call) {
    constexpr unsigned int kKnown = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
    require(address != nullptr && bytes > 0 && (flags & ~kKnown) == 0);
    call.take(call.simulator.settings.pin_seconds_per_byte * static_cast<double>(bytes), call.simulator.pinning);
    const auto begin = reinterpret_cast<uint64_t>(address);
    const bool portable = (flags & CU_MEMHOSTREGISTER_PORTABLE) != 0;
    const HostRange* range = call.simulator.host.add({{begin, begin + bytes},
                                                      HostOrigin::kRegistered,
                                                      portable ? Portability::kPortable : Portability::kContext,
                                                      &call.context(),
                                                      {}});
    if (range == nullptr) throw DriverError{CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED};
  });
}

CUresult CUDAAPI cuMemHostUnregister(void* address) {
  return release_call("cuMemHostUnregister", Needs::kContext, [&](Call& call) {
    const HostRange* range = call.simulator.host.at(address);
    if (range == nullptr) throw DriverError{CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED};
    forget_host(call, *range, HostOrigin::kRegistered);
  });
}

CUresult CUDAAPI cuPointerGetAttribute(void* data, CUpointer_attribute wanted, CUdeviceptr address) {
  return call("cuPointerGetAttribute", Needs::kContext, [&](Call& call) {
    require(data != nullptr);
    Context* device = call.simulator.owner_of(address);
    if (device != nullptr) require(device->memory.find(address) != nullptr);
    const HostRange* host = device == nullptr ? call.simulator.host.find({address, address + 1}) : nullptr;
    require(device != nullptr || host != nullptr);
    Context* context = device != nullptr ? device : host->context;
    switch (wanted) {
      case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *static_cast<unsigned int*>(data) = device != nullptr ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
        break;
      case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *static_cast<int*>(data) = context->device;
        break;
      case CU_POINTER_ATTRIBUTE_CONTEXT:
        *static_cast<CUcontext*>(data) = handle_of(context);
        break;
      default:
        call.simulator.reports.add("UNKNOWN: " + call.label() + ": attribute " + std::to_string(wanted));
        throw DriverError{CUDA_ERROR_INVALID_VALUE};
    }
  });
}

}  // extern "C"

}  // namespace simcuda
