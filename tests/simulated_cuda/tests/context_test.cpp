#include <cstring>
#include <thread>

#include "machine.h"

using namespace simcuda::testing;

TEST_CASE("devices are counted and described") {
  const Machine machine;
  int value = 0;
  OK(cuDeviceGetCount(&value));
  CHECK(value == 2);
  CUdevice device = -1;
  OK(cuDeviceGet(&device, 1));
  CHECK(device == 1);
  CHECK(cuDeviceGet(&device, 2) == CUDA_ERROR_INVALID_DEVICE);
  OK(cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1));
  CHECK(value == 1);
  OK(cuDriverGetVersion(&value));
  CHECK(value >= 11000);
}

TEST_CASE("errors have names") {
  const char* text = nullptr;
  OK(cuGetErrorName(CUDA_ERROR_ILLEGAL_ADDRESS, &text));
  CHECK(std::strcmp(text, "CUDA_ERROR_ILLEGAL_ADDRESS") == 0);
  OK(cuGetErrorString(CUDA_ERROR_ILLEGAL_ADDRESS, &text));
  CHECK(text != nullptr);
  CHECK(cuGetErrorName(static_cast<CUresult>(998), &text) == CUDA_ERROR_INVALID_VALUE);
  CHECK(text == nullptr);
}

TEST_CASE("every thread has a current context of its own") {
  Machine machine;
  std::thread([&] {
    CUcontext current = machine.context(0);
    OK(cuCtxGetCurrent(&current));
    CHECK(current == nullptr);
    CUdeviceptr address = 0;
    CHECK(cuMemAlloc_v2(&address, 16) == CUDA_ERROR_INVALID_CONTEXT);
    machine.use(1);
    CUdevice device = -1;
    OK(cuCtxGetDevice(&device));
    CHECK(device == 1);
  }).join();
  Machine::expect("CONTEXT: cuMemAlloc_v2");
  CUdevice device = -1;
  OK(cuCtxGetDevice(&device));
  CHECK(device == 0);
}

TEST_CASE("a primary context lives as long as it is retained") {
  Machine machine;
  CUcontext again = nullptr;
  OK(cuDevicePrimaryCtxRetain(&again, 0));
  CHECK(again == machine.context(0));
  OK(cuDevicePrimaryCtxRelease_v2(0));
  {
    const DeviceBuffer still_usable(16);
  }
  OK(cuDevicePrimaryCtxRelease_v2(0));
  CHECK(cuDevicePrimaryCtxRelease_v2(0) == CUDA_ERROR_INVALID_CONTEXT);
  CUdeviceptr address = 0;
  CHECK(cuMemAlloc_v2(&address, 16) == CUDA_ERROR_CONTEXT_IS_DESTROYED);
  Machine::expect("CONTEXT");
  CHECK(cuCtxSetCurrent(machine.context(0)) == CUDA_ERROR_INVALID_CONTEXT);
  OK(cuDevicePrimaryCtxRetain(&again, 0));
}

TEST_CASE("what a context takes with it is a leak") {
  Machine machine;
  CUdeviceptr address = 0;
  OK(cuMemAlloc_v2(&address, 100));
  CUstream stream = nullptr;
  OK(cuStreamCreate(&stream, CU_STREAM_DEFAULT));
  std::string text(1000, '\0');
  CHECK(simcuda_leaks(text.data(), static_cast<int>(text.size())) == 4);
  CHECK(text.find("1 device allocations, 1 streams, 2 contexts") == 0);
  OK(cuDevicePrimaryCtxRelease_v2(0));
  Machine::expect("LEAK: the context of device 0 was released with 2 objects");
  CUcontext again = nullptr;
  OK(cuDevicePrimaryCtxRetain(&again, 0));
  machine.use(0);
  CHECK(cuStreamSynchronize(stream) == CUDA_ERROR_INVALID_HANDLE);
}

TEST_CASE("handles of another device are refused where the driver does so") {
  Machine machine;
  const StreamHandle stream;
  const EventHandle event;
  machine.use(1);
  const StreamHandle other_stream;
  const EventHandle other_event;
  CHECK(cuEventRecord(event, other_stream) == CUDA_ERROR_INVALID_HANDLE);
  CHECK(cuEventRecord(other_event, stream) == CUDA_ERROR_INVALID_HANDLE);
  // These work across devices.
  OK(cuEventRecord(event, stream));
  OK(cuStreamWaitEvent(other_stream, event, 0));
  OK(cuStreamSynchronize(stream));
  OK(cuEventSynchronize(event));
}
