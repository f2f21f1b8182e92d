// Every detector of races is shown a program with the order that it needs, and the same one without it. None depends
// on timing: copies are instant here.
#include <chrono>
#include <thread>

#include "kernel_texts.h"
#include "machine.h"

using namespace simcuda::testing;

namespace {

enum class Order { kThere, kMissing };

void expect_race_if_missing(Order order) {
  if (order == Order::kMissing) {
    Machine::expect("RACE");
  } else {
    CHECK_MESSAGE(reports() == 0, report_text());
  }
}

}  // namespace

TEST_CASE("the host writes a source again") {
  const Machine machine;
  for (const Order order : {Order::kThere, Order::kMissing}) {
    const StreamHandle stream;
    const EventHandle event;
    PinnedBuffer host(100);
    const DeviceBuffer buffer(100);
    host.fill(1);
    OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
    OK(cuEventRecord(event, stream));
    if (order == Order::kThere) OK(cuEventSynchronize(event));
    simcuda_host_write(host.data() + 99, 1, "test");
    expect_race_if_missing(order);
  }
}

TEST_CASE("an event that was recorded before the copy orders nothing") {
  const Machine machine;
  const StreamHandle stream;
  const EventHandle event;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  OK(cuEventRecord(event, stream));
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  OK(cuEventSynchronize(event));
  simcuda_host_write(host.data(), 1, "test");
  Machine::expect("RACE: the write by the host, test is not ordered with the read by cuMemcpyHtoDAsync_v2");
}

TEST_CASE("a query that says ready is as good as a wait") {
  const Machine machine;
  const StreamHandle stream;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  while (cuStreamQuery(stream) == CUDA_ERROR_NOT_READY) std::this_thread::yield();
  simcuda_host_write(host.data(), 100, "test");
}

TEST_CASE("the host reads what a copy brings") {
  const Machine machine;
  for (const Order order : {Order::kThere, Order::kMissing}) {
    const StreamHandle stream;
    PinnedBuffer host(100);
    const DeviceBuffer buffer(100);
    OK(cuMemcpyDtoHAsync_v2(host.data(), buffer, 100, stream));
    if (order == Order::kThere) OK(cuCtxSynchronize());
    simcuda_host_read(host.data(), 100, "test");
    expect_race_if_missing(order);
  }
}

TEST_CASE("the host may read the source of a copy") {
  const Machine machine;
  const StreamHandle stream;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  simcuda_host_read(host.data(), 100, "test");
}

TEST_CASE("two streams use the same device memory") {
  const Machine machine;
  for (const Order order : {Order::kThere, Order::kMissing}) {
    const StreamHandle one;
    const StreamHandle other;
    const EventHandle event;
    const DeviceBuffer buffer(100);
    OK(cuMemsetD8Async(buffer, 1, 100, one));
    OK(cuEventRecord(event, one));
    if (order == Order::kThere) OK(cuStreamWaitEvent(other, event, 0));
    OK(cuMemsetD8Async(buffer, 2, 100, other));
    expect_race_if_missing(order);
  }
}

TEST_CASE("neighbouring bytes are no race, nor are two reads") {
  const Machine machine;
  const StreamHandle one;
  const StreamHandle other;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  OK(cuMemsetD8Async(buffer, 1, 50, one));
  OK(cuMemsetD8Async(buffer + 50, 2, 50, other));
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 50, one));
  OK(cuMemcpyHtoDAsync_v2(buffer + 50, host.data(), 50, other));
}

TEST_CASE("the default stream orders blocking streams, but not others") {
  const Machine machine;
  for (const Order order : {Order::kThere, Order::kMissing}) {
    const StreamHandle stream(order == Order::kThere ? CU_STREAM_DEFAULT : CU_STREAM_NON_BLOCKING);
    const DeviceBuffer buffer(100);
    OK(cuMemsetD8Async(buffer, 1, 100, nullptr));
    OK(cuMemsetD8Async(buffer, 2, 100, stream));
    expect_race_if_missing(order);
    OK(cuCtxSynchronize());
    OK(cuMemsetD8Async(buffer, 2, 100, stream));
    OK(cuMemsetD8Async(buffer, 1, 100, nullptr));
    expect_race_if_missing(order);
  }
}

TEST_CASE("a blocking copy waits for the default stream only") {
  const Machine machine;
  const StreamHandle stream;
  const DeviceBuffer buffer(100);
  OK(cuMemsetD8Async(buffer, 1, 100, stream));
  buffer.read();
  Machine::expect("RACE: the read by cuMemcpyDtoH_v2");
}

TEST_CASE("what one thread waited for, others may rely on") {
  Machine machine;
  const StreamHandle stream;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  std::thread([&] {
    machine.use(0);
    OK(cuStreamSynchronize(stream));
  }).join();
  simcuda_host_write(host.data(), 100, "test");
}

TEST_CASE("kernels race with copies, whichever runs first") {
  const Machine machine;
  const Kernels kernels;
  for (const Order order : {Order::kThere, Order::kMissing}) {
    for (const bool kernel_first : {true, false}) {
      const StreamHandle copies;
      const StreamHandle launches;
      const EventHandle event;
      PinnedBuffer host(400);
      const DeviceBuffer from(400);
      const DeviceBuffer to(400);
      OK(cuMemsetD8Async(from, 1, 400, nullptr));
      OK(cuStreamSynchronize(nullptr));
      const auto launch = [&] { kernels.copy_words(to, from, 100, launches); };
      const auto copy = [&] { OK(cuMemcpyHtoDAsync_v2(from, host.data(), 400, copies)); };
      const CUstream first = kernel_first ? launches : copies;
      const CUstream second = kernel_first ? copies : launches;
      kernel_first ? launch() : copy();
      OK(cuEventRecord(event, first));
      if (order == Order::kThere) OK(cuStreamWaitEvent(second, event, 0));
      kernel_first ? copy() : launch();
      OK(cuCtxSynchronize());
      expect_race_if_missing(order);
    }
  }
}

TEST_CASE("a kernel that is still waiting races with work that the host has already waited for") {
  const Machine machine;
  const Kernels kernels;
  const StreamHandle copies;
  const StreamHandle launches;
  PinnedBuffer host(400);
  const DeviceBuffer from(400);
  const DeviceBuffer to(400);
  const DeviceBuffer unrelated(400);
  simcuda_set("latency_us", 50000);
  OK(cuMemcpyHtoDAsync_v2(unrelated, host.data(), 400, launches));  // keeps the stream busy
  kernels.copy_words(to, from, 100, launches);
  OK(cuMemsetD8Async(to, 1, 400, copies));
  OK(cuStreamSynchronize(copies));
  OK(cuMemsetD8Async(to, 1, 400, copies));
  OK(cuCtxSynchronize());
  Machine::expect("RACE: the write by cuLaunchKernel");
}

TEST_CASE("bytes that a kernel leaves out are free to be written") {
  const Machine machine;
  const Kernels kernels;
  const StreamHandle copies;
  const StreamHandle launches;
  const DeviceBuffer from(800);
  const DeviceBuffer to(800);
  kernels.copy_words(to, from, 100, launches);
  OK(cuMemsetD8Async(to + 400, 1, 400, copies));
  OK(cuMemsetD8Async(from + 400, 1, 400, copies));
  OK(cuCtxSynchronize());
}

TEST_CASE("long runs do not become slow") {
  const Machine machine;
  const StreamHandle stream;
  const StreamHandle other;
  const EventHandle event;
  const DeviceBuffer buffer(1 << 20);
  constexpr unsigned int kPieces = 1 << 10;
  const auto start = std::chrono::steady_clock::now();
  for (unsigned int index = 0; index < 20 * kPieces; ++index) {
    OK(cuMemsetD8Async(buffer + index % kPieces * kPieces, 1, kPieces, index % 2 != 0 ? stream : other));
    if (index % 100 != 99) continue;
    OK(cuStreamSynchronize(stream));
    OK(cuStreamSynchronize(other));
  }
  // Streams come and go without a trace.
  for (int index = 0; index < 2000; ++index) {
    const StreamHandle brief;
    OK(cuMemsetD8Async(buffer, 1, 1, brief));
    OK(cuStreamSynchronize(brief));
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  CHECK(elapsed.count() < 20);
}

TEST_CASE("races are not looked for where that is switched off") {
  const Machine machine;
  simcuda_set("races", 0);
  const StreamHandle one;
  const StreamHandle other;
  const DeviceBuffer buffer(100);
  OK(cuMemsetD8Async(buffer, 1, 100, one));
  OK(cuMemsetD8Async(buffer, 2, 100, other));
  OK(cuCtxSynchronize());
  simcuda_set("races", 1);
}
