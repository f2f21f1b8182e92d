#include <stdexcept>

#include "driver/faults.h"
#include "machine.h"

using namespace simcuda::testing;

TEST_CASE("the nth call fails and does nothing") {
  const Machine machine;
  const long before = simcuda_calls("cuMemAlloc_v2");
  simcuda_fault("cuMemAlloc_v2", 2, CUDA_ERROR_OUT_OF_MEMORY, 0);
  const DeviceBuffer first(10);
  CUdeviceptr second = 0;
  CHECK(cuMemAlloc_v2(&second, 10) == CUDA_ERROR_OUT_OF_MEMORY);
  CHECK(second == 0);
  const DeviceBuffer third(10);
  CHECK(simcuda_calls("cuMemAlloc_v2") == before + 3);
  CHECK(simcuda_calls("") > before + 3);
}

TEST_CASE("a call that gives something back does so although it fails") {
  const Machine machine;
  CUevent event = nullptr;
  OK(cuEventCreate(&event, 0));
  simcuda_fault("cuEventDestroy_v2", 1, CUDA_ERROR_UNKNOWN, 0);
  CHECK(cuEventDestroy_v2(event) == CUDA_ERROR_UNKNOWN);
  CHECK(cuEventDestroy_v2(event) == CUDA_ERROR_INVALID_HANDLE);
}

TEST_CASE("an asynchronous fault shows up later and stays") {
  Machine machine;
  const StreamHandle stream;
  PinnedBuffer host(100, 1);
  const DeviceBuffer buffer(100);
  machine.use(1);
  const DeviceBuffer unharmed(100);
  machine.use(0);
  simcuda_fault("cuMemcpyHtoDAsync_v2", 1, CUDA_ERROR_LAUNCH_FAILED, 1);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  CHECK(cuStreamSynchronize(stream) == CUDA_ERROR_LAUNCH_FAILED);
  CHECK(cuStreamQuery(stream) == CUDA_ERROR_LAUNCH_FAILED);
  CUevent event = nullptr;
  CHECK(cuEventCreate(&event, 0) == CUDA_ERROR_LAUNCH_FAILED);
  machine.use(1);
  OK(cuMemsetD8Async(unharmed, 1, 100, nullptr));
  OK(cuCtxSynchronize());
  machine.use(0);
  simcuda_reset();
  CHECK(buffer.read() == bytes_of(100, 0xCB));
  machine.use(1);
}

TEST_CASE("an asynchronous fault of a call without work breaks the context at once") {
  const Machine machine;
  simcuda_fault("cuMemAlloc_v2", 1, CUDA_ERROR_ILLEGAL_ADDRESS, 1);
  CUdeviceptr address = 0;
  OK(cuMemAlloc_v2(&address, 10));
  CHECK(cuMemFree_v2(address) == CUDA_ERROR_ILLEGAL_ADDRESS);
}

TEST_CASE("work that waits for a context that failed does not hang") {
  Machine machine;
  const EventHandle event;
  const StreamHandle stream;
  const DeviceBuffer buffer(1);
  PinnedBuffer host(1);
  machine.use(1);
  const StreamHandle other;
  machine.use(0);
  simcuda_set("latency_us", 150000);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 1, stream));
  simcuda_fault("cuMemsetD8Async", 1, CUDA_ERROR_LAUNCH_FAILED, 1);
  OK(cuMemsetD8Async(buffer, 1, 1, stream));
  OK(cuEventRecord(event, stream));
  machine.use(1);
  OK(cuStreamWaitEvent(other, event, 0));
  OK(cuStreamSynchronize(other));
  CHECK(cuEventSynchronize(event) == CUDA_ERROR_LAUNCH_FAILED);
  simcuda_reset();
}

TEST_CASE("a fault of a function that does not exist is a mistake") {
  const Machine machine;
  simcuda_fault("cuMemAlloc", 1, CUDA_ERROR_OUT_OF_MEMORY, 0);
  Machine::expect("UNKNOWN: simcuda_fault: there is no function cuMemAlloc");
}

TEST_CASE("faults are read from text") {
  simcuda::Faults faults;
  faults.plan("cuInit:2=3;async:cuMemAlloc_v2:1=700;");
  CHECK(faults.next_call("cuInit").error == CUDA_SUCCESS);
  CHECK(faults.next_call("cuInit").error == CUDA_ERROR_NOT_INITIALIZED);
  const simcuda::Fault fault = faults.next_call("cuMemAlloc_v2");
  CHECK(fault.error == CUDA_ERROR_ILLEGAL_ADDRESS);
  CHECK(fault.time == simcuda::FaultTime::kWork);
  CHECK(faults.next_call("cuMemAlloc_v2").error == CUDA_SUCCESS);
  CHECK_THROWS_AS(faults.plan("cuInit=3"), std::invalid_argument);
  CHECK_THROWS_AS(faults.plan("cuInit:x=3"), std::invalid_argument);
}
