#include <thread>

#include "machine.h"

using namespace simcuda::testing;

TEST_CASE("fresh device memory is poisoned, also where memory was freed before") {
  const Machine machine;
  for (int round = 0; round < 2; ++round) {
    const DeviceBuffer buffer(1000);
    CHECK(buffer.read() == bytes_of(1000, 0xCB));
    OK(cuMemsetD8Async(buffer, 7, 1000, nullptr));
    CHECK(buffer.read() == bytes_of(1000, 7));
  }
}

TEST_CASE("devices have memory and limits of their own") {
  Machine machine;
  simcuda_set("memory_mb", 1);
  CUdeviceptr first = 0;
  CUdeviceptr second = 0;
  OK(cuMemAlloc_v2(&first, 600 << 10));
  CHECK(cuMemAlloc_v2(&second, 600 << 10) == CUDA_ERROR_OUT_OF_MEMORY);
  machine.use(1);
  OK(cuMemAlloc_v2(&second, 600 << 10));
  OK(cuMemFree_v2(second));
  machine.use(0);
  OK(cuMemFree_v2(first));
  OK(cuMemAlloc_v2(&first, 1 << 20));
  OK(cuMemFree_v2(first));
  CHECK(cuMemAlloc_v2(&first, 0) == CUDA_ERROR_INVALID_VALUE);
  simcuda_set("memory_mb", 4096);
}

TEST_CASE("copies outside an allocation are refused and reported") {
  const Machine machine;
  const DeviceBuffer buffer(100);
  const DeviceBuffer neighbour(100);
  unsigned char bytes[200] = {};
  CHECK(cuMemcpyHtoD_v2(buffer, bytes, 101) == CUDA_ERROR_INVALID_VALUE);
  Machine::expect("OUT-OF-BOUNDS");
  CHECK(cuMemcpyHtoD_v2(buffer + 100, bytes, 1) == CUDA_ERROR_INVALID_VALUE);
  Machine::expect("OUT-OF-BOUNDS");
  CHECK(cuMemcpyHtoD_v2(reinterpret_cast<CUdeviceptr>(bytes), bytes + 100, 1) == CUDA_ERROR_INVALID_VALUE);
  Machine::expect("is no device address");
  CHECK(cuMemcpyDtoH_v2(reinterpret_cast<void*>(CUdeviceptr(neighbour)), buffer, 1) == CUDA_ERROR_INVALID_VALUE);
  Machine::expect("a device address where a host address belongs");
  OK(cuMemcpyHtoD_v2(buffer + 99, bytes, 1));
  OK(cuMemcpyHtoD_v2(buffer, bytes, 0));
}

TEST_CASE("freed memory is not used again silently") {
  const Machine machine;
  CUdeviceptr address = 0;
  OK(cuMemAlloc_v2(&address, 100));
  OK(cuMemFree_v2(address));
  CHECK(cuMemsetD8Async(address, 0, 10, nullptr) == CUDA_ERROR_INVALID_VALUE);
  Machine::expect("USE-AFTER-FREE");
  CHECK(cuMemFree_v2(address) == CUDA_ERROR_INVALID_VALUE);
  Machine::expect("USE-AFTER-FREE");
  OK(cuMemFree_v2(0));
}

TEST_CASE("memory is freed only after the host waited for what touches it") {
  const Machine machine;
  const StreamHandle stream;
  for (const bool waits : {true, false}) {
    CUdeviceptr address = 0;
    OK(cuMemAlloc_v2(&address, 100));
    OK(cuMemsetD8Async(address, 0, 100, stream));
    if (waits) OK(cuStreamSynchronize(stream));
    OK(cuMemFree_v2(address));
    CHECK(reports("USE-AFTER-FREE") == (waits ? 0 : 1));
  }
  Machine::expect("USE-AFTER-FREE: cuMemFree_v2");
}

TEST_CASE("host memory is unregistered only after the host waited for the copies") {
  const Machine machine;
  const StreamHandle stream;
  const DeviceBuffer buffer(100);
  std::vector<unsigned char> host(100);
  for (const bool waits : {true, false}) {
    OK(cuMemHostRegister_v2(host.data(), host.size(), 0));
    OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), host.size(), stream));
    if (waits) OK(cuStreamSynchronize(stream));
    OK(cuMemHostUnregister(host.data()));
    CHECK(reports("USE-AFTER-UNREGISTER") == (waits ? 0 : 1));
  }
  Machine::expect("USE-AFTER-UNREGISTER: cuMemHostUnregister");
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), host.size(), stream));
  Machine::expect("USE-AFTER-UNREGISTER");
}

TEST_CASE("host ranges are registered once") {
  const Machine machine;
  std::vector<unsigned char> host(100);
  OK(cuMemHostRegister_v2(host.data(), 50, 0));
  CHECK(cuMemHostRegister_v2(host.data() + 49, 10, 0) == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  OK(cuMemHostRegister_v2(host.data() + 50, 10, 0));
  CHECK(cuMemHostUnregister(host.data() + 1) == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  CHECK(cuMemHostRegister_v2(host.data() + 80, 0, 0) == CUDA_ERROR_INVALID_VALUE);
  OK(cuMemHostUnregister(host.data()));
  OK(cuMemHostUnregister(host.data() + 50));
}

TEST_CASE("pinned memory comes from the driver as well") {
  const Machine machine;
  void* host = nullptr;
  OK(cuMemHostAlloc(&host, 5000, CU_MEMHOSTALLOC_PORTABLE));
  CHECK(cuMemHostUnregister(host) == CUDA_ERROR_INVALID_VALUE);
  const DeviceBuffer buffer(5000);
  OK(cuMemcpyHtoDAsync_v2(buffer, host, 5000, nullptr));
  OK(cuStreamSynchronize(nullptr));
  OK(cuMemFreeHost(host));
}

TEST_CASE("pointers tell what they are") {
  Machine machine;
  PinnedBuffer pinned(10);
  machine.use(1);
  const DeviceBuffer buffer(10);
  machine.use(0);
  unsigned int type = 0;
  OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, buffer + 9));
  CHECK(type == CU_MEMORYTYPE_DEVICE);
  OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, reinterpret_cast<CUdeviceptr>(pinned.data() + 9)));
  CHECK(type == CU_MEMORYTYPE_HOST);
  int device = -1;
  OK(cuPointerGetAttribute(&device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, buffer));
  CHECK(device == 1);
  CUcontext context = nullptr;
  OK(cuPointerGetAttribute(&context, CU_POINTER_ATTRIBUTE_CONTEXT, buffer));
  CHECK(context == machine.context(1));
  CHECK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, reinterpret_cast<CUdeviceptr>(&type)) ==
        CUDA_ERROR_INVALID_VALUE);
  machine.use(1);
}
