#include <atomic>
#include <thread>
#include <vector>

#include "machine.h"

using namespace simcuda::testing;

namespace {

// Keeps a stream busy for a while.
void occupy(CUstream stream, const DeviceBuffer& buffer, PinnedBuffer& host) {
  simcuda_set("latency_us", 150000);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 1, stream));
}

}  // namespace

TEST_CASE("streams are busy until their work is done") {
  const Machine machine;
  const DeviceBuffer buffer(1);
  PinnedBuffer host(1);
  const StreamHandle stream;
  OK(cuStreamQuery(stream));
  occupy(stream, buffer, host);
  CHECK(cuStreamQuery(stream) == CUDA_ERROR_NOT_READY);
  OK(cuStreamSynchronize(stream));
  OK(cuStreamQuery(stream));
  CUstream invalid = nullptr;
  CHECK(cuStreamCreate(&invalid, 12) == CUDA_ERROR_INVALID_VALUE);
}

TEST_CASE("the default stream and blocking streams wait for each other, non-blocking ones do not") {
  const Machine machine;
  const DeviceBuffer buffer(1);
  const DeviceBuffer other(1);
  PinnedBuffer host(1);
  const StreamHandle blocking(CU_STREAM_DEFAULT);
  const StreamHandle free_stream;

  occupy(blocking, buffer, host);
  OK(cuMemsetD8Async(other, 1, 1, free_stream));
  OK(cuStreamSynchronize(free_stream));
  CHECK(cuStreamQuery(blocking) == CUDA_ERROR_NOT_READY);
  OK(cuMemsetD8Async(buffer, 1, 1, nullptr));
  OK(cuStreamSynchronize(nullptr));
  OK(cuStreamQuery(blocking));

  occupy(nullptr, buffer, host);
  OK(cuMemsetD8Async(buffer, 1, 1, blocking));
  OK(cuStreamSynchronize(blocking));
  OK(cuStreamQuery(CU_STREAM_LEGACY));

  occupy(nullptr, buffer, host);
  OK(cuStreamSynchronize(free_stream));
  CHECK(cuStreamQuery(nullptr) == CUDA_ERROR_NOT_READY);
}

TEST_CASE("a stream that is destroyed does its work first, and its handle is dead") {
  const Machine machine;
  const DeviceBuffer buffer(1);
  PinnedBuffer host(1, 4);
  CUstream stream = nullptr;
  OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  occupy(stream, buffer, host);
  OK(cuStreamDestroy_v2(stream));
  CHECK(cuStreamDestroy_v2(stream) == CUDA_ERROR_INVALID_HANDLE);
  CHECK(cuStreamSynchronize(stream) == CUDA_ERROR_INVALID_HANDLE);
  OK(cuCtxSynchronize());
  CHECK(buffer.read() == bytes_of(1, 4));
}

TEST_CASE("events mark places in streams") {
  const Machine machine;
  const DeviceBuffer buffer(1);
  PinnedBuffer host(1);
  const StreamHandle stream;
  const StreamHandle other;
  const EventHandle event;
  OK(cuEventQuery(event));
  OK(cuEventSynchronize(event));
  OK(cuStreamWaitEvent(other, event, 0));

  occupy(stream, buffer, host);
  OK(cuEventRecord(event, stream));
  CHECK(cuEventQuery(event) == CUDA_ERROR_NOT_READY);
  OK(cuStreamWaitEvent(other, event, 0));
  CHECK(cuStreamQuery(other) == CUDA_ERROR_NOT_READY);
  OK(cuEventSynchronize(event));
  OK(cuStreamSynchronize(other));
  OK(cuEventQuery(event));
}

TEST_CASE("a wait is for the record that was the latest when it was asked for") {
  const Machine machine;
  const DeviceBuffer buffer(1);
  PinnedBuffer host(1);
  const StreamHandle idle;
  const StreamHandle busy;
  const StreamHandle waiting;
  const EventHandle event;
  OK(cuEventRecord(event, idle));
  OK(cuStreamWaitEvent(waiting, event, 0));
  occupy(busy, buffer, host);
  OK(cuEventRecord(event, busy));
  OK(cuStreamSynchronize(waiting));
  CHECK(cuEventQuery(event) == CUDA_ERROR_NOT_READY);
  OK(cuEventSynchronize(event));
}

TEST_CASE("events tell the time between them") {
  const Machine machine;
  const DeviceBuffer buffer(1);
  PinnedBuffer host(1);
  const StreamHandle stream;
  const EventHandle start;
  const EventHandle end;
  const EventHandle untimed(CU_EVENT_DISABLE_TIMING);
  float milliseconds = 0;
  CHECK(cuEventElapsedTime(&milliseconds, start, end) == CUDA_ERROR_INVALID_HANDLE);
  OK(cuEventRecord(start, stream));
  OK(cuEventRecord(untimed, stream));
  occupy(stream, buffer, host);
  OK(cuEventRecord(end, stream));
  CHECK(cuEventElapsedTime(&milliseconds, start, end) == CUDA_ERROR_NOT_READY);
  OK(cuEventSynchronize(end));
  OK(cuEventElapsedTime(&milliseconds, start, end));
  CHECK(milliseconds >= 149);
  CHECK(milliseconds < 10000);
  CHECK(cuEventElapsedTime(&milliseconds, start, untimed) == CUDA_ERROR_INVALID_HANDLE);
  CUevent invalid = nullptr;
  CHECK(cuEventCreate(&invalid, 64) == CUDA_ERROR_INVALID_VALUE);
}

TEST_CASE("many threads use the driver at once") {
  Machine machine;
  constexpr int kThreads = 6;
  constexpr int kRounds = 50;
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int index = 0; index < kThreads; ++index) {
    threads.emplace_back([&, index] {
      machine.use(index % 2);
      PinnedBuffer host(5000);
      const StreamHandle stream;
      const EventHandle event;
      for (int round = 0; round < kRounds; ++round) {
        const DeviceBuffer buffer(5000);
        const auto value = static_cast<unsigned char>(index * kRounds + round);
        host.fill(value);
        OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), host.size(), stream));
        OK(cuEventRecord(event, stream));
        OK(cuEventSynchronize(event));
        if (buffer.read() == bytes_of(5000, value)) ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(right == kThreads * kRounds);
}
