#include <chrono>

#include "machine.h"

using namespace simcuda::testing;

namespace {

constexpr size_t kMegabyte = 1 << 20;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("bytes go to the device, between places on it, and back") {
  const Machine machine;
  const StreamHandle stream;
  PinnedBuffer host(3 * kMegabyte, 1);
  PinnedBuffer result(3 * kMegabyte);
  const DeviceBuffer one(host.size());
  const DeviceBuffer other(host.size());
  host.data()[12345] = 9;
  OK(cuMemcpyHtoDAsync_v2(one, host.data(), host.size(), stream));
  OK(cuMemcpyDtoDAsync_v2(other, one, host.size(), stream));
  OK(cuMemcpyDtoHAsync_v2(result.data(), other, host.size(), stream));
  OK(cuStreamSynchronize(stream));
  CHECK(result.data()[12345] == 9);
  CHECK(result.data()[12346] == 1);
  CHECK(simcuda_statistic("copies", 0, 0) == 1);
  CHECK(simcuda_statistic("bytes_to_device", 0, 1) == 3 * kMegabyte);
  CHECK(simcuda_statistic("bytes_to_device", -1, 0) == 0);
  CHECK(simcuda_statistic("unheard of", 0, 0) == -1);
}

TEST_CASE("bytes go between devices") {
  Machine machine;
  const DeviceBuffer here(100);
  machine.use(1);
  const DeviceBuffer there(100);
  OK(cuMemsetD8Async(there, 5, 100, nullptr));
  OK(cuMemcpyDtoDAsync_v2(here, there, 100, nullptr));
  OK(cuCtxSynchronize());
  CHECK(here.read() == bytes_of(100, 5));
  machine.use(1);
}

TEST_CASE("asynchronous copies from memory that is not pinned are reported and still done") {
  Machine machine;
  const StreamHandle stream;
  const DeviceBuffer buffer(100);
  std::vector<unsigned char> host(100, 3);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  Machine::expect("PAGEABLE: cuMemcpyHtoDAsync_v2");
  OK(cuStreamSynchronize(stream));
  CHECK(buffer.read() == bytes_of(100, 3));
  OK(cuMemcpyDtoHAsync_v2(host.data(), buffer, 100, stream));
  Machine::expect("PAGEABLE: cuMemcpyDtoHAsync_v2");

  PinnedBuffer half(50);
  OK(cuMemcpyHtoDAsync_v2(buffer, half.data(), 50, stream));
  CHECK(reports() == 0);
}

TEST_CASE("memory that is pinned for one context is not for others unless it is portable") {
  Machine machine;
  std::vector<unsigned char> host(100);
  machine.use(1);
  OK(cuMemHostRegister_v2(host.data(), host.size(), 0));
  machine.use(0);
  const DeviceBuffer buffer(100);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, nullptr));
  OK(cuCtxSynchronize());
  Machine::expect("PAGEABLE");
  OK(cuMemHostUnregister(host.data()));
}

TEST_CASE("a copy on a stream of another device is reported") {
  Machine machine;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  machine.use(1);
  {
    const StreamHandle stream;
    OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
    OK(cuStreamSynchronize(stream));
  }
  Machine::expect("CONTEXT: cuMemcpyHtoDAsync_v2");
  machine.use(0);
}

TEST_CASE("a source that changes under way is noticed") {
  const Machine machine;
  const StreamHandle stream;
  PinnedBuffer host(100);
  const DeviceBuffer buffer(100);
  simcuda_set("latency_us", 100000);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  host.data()[50] = 1;
  OK(cuStreamSynchronize(stream));
  Machine::expect("HOST-CHANGED");
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  OK(cuStreamSynchronize(stream));
  host.data()[50] = 2;
}

TEST_CASE("a copy reads its source late or early, as set") {
  const Machine machine;
  const StreamHandle stream;
  simcuda_set("latency_us", 200000);
  simcuda_set("races", 0);
  for (const bool late : {true, false}) {
    PinnedBuffer host(1, 1);
    const DeviceBuffer buffer(1);
    simcuda_set("late", late ? 1 : 0);
    OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 1, stream));
    const auto start = std::chrono::steady_clock::now();
    while (seconds_since(start) < 0.1) {
    }
    host.data()[0] = 2;
    OK(cuStreamSynchronize(stream));
    CHECK(buffer.read()[0] == (late ? 2 : 1));
  }
  simcuda_set("late", 1);
  simcuda_set("races", 1);
}

TEST_CASE("copies take as long as latency and bandwidth say, and streams of a device share the link") {
  Machine machine;
  const StreamHandle one;
  const StreamHandle other;
  PinnedBuffer host(4 * kMegabyte);
  const DeviceBuffer buffer(8 * kMegabyte);
  machine.use(1);
  const StreamHandle there;
  const DeviceBuffer buffer_there(4 * kMegabyte);
  machine.use(0);
  simcuda_set("copy_gbps", 0.04);
  simcuda_set("latency_us", 1000);
  const double each = 4 * kMegabyte / 0.04e9 + 0.001;
  const auto start = std::chrono::steady_clock::now();
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), host.size(), one));
  OK(cuMemcpyHtoDAsync_v2(buffer + host.size(), host.data(), host.size(), other));
  OK(cuMemcpyHtoDAsync_v2(buffer_there, host.data(), host.size(), there));
  CHECK(cuStreamQuery(one) == CUDA_ERROR_NOT_READY);
  OK(cuStreamSynchronize(there));
  // Which of the two was first is not said.
  CHECK((cuStreamQuery(one) == CUDA_ERROR_NOT_READY || cuStreamQuery(other) == CUDA_ERROR_NOT_READY));
  OK(cuStreamSynchronize(one));
  OK(cuStreamSynchronize(other));
  CHECK(seconds_since(start) >= 2 * each);
  CHECK(simcuda_busy_seconds(0, "copy", 1) == doctest::Approx(2 * each));
  CHECK(simcuda_busy_seconds(1, "copy", 1) == doctest::Approx(each));
  CHECK(simcuda_busy_seconds(0, "copy", 0) == 0);
  machine.use(1);
}
