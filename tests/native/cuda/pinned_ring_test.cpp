// How pinned rings live beside each other and beside the program that uses them.

#include <chrono>
#include <future>
#include <optional>
#include <utility>

#include "device_load.h"
#include "doctest/doctest.h"
#include "error.h"
#include "test_device.h"
#include "transfer/engine.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using cuda::ContextHandle;
using cuda::PinnedRing;
using transfer::Layouts;
using transfer::Program;

namespace {

ContextHandle current_context() {
  ContextHandle handle = nullptr;
  DCP_FAST_CUDA(cuCtxGetCurrent, &handle);
  return handle;
}

}  // namespace

TEST_CASE("ring: two loads from two threads, each with its own") {
  const Clean clean;
  const SlowCopies slow(500);
  const auto load = [] {
    Matrix matrix(512, 512);
    matrix.want(0, {0, 0}, {512, 512}, 4);
    matrix.want(other_device(), {0, 0}, {512, 512});
    Gpu gpu(kMiB, 65536);
    const Layouts layouts = matrix.files.layouts({});
    const Program program(layouts, matrix.items, matrix.destinations);
    gpu.run(program, {});
    gpu.synchronize();
    return matrix.arrived();
  };
  std::future<bool> other = std::async(std::launch::async, load);
  CHECK(load());
  CHECK(other.get());
}

TEST_CASE("ring: it can go while its last work is under way") {
  const Clean clean;
  const SlowCopies slow(20000);
  Matrix matrix(512, 512);
  matrix.want(0, {0, 0}, {512, 512}, 4);
  matrix.want(other_device(), {0, 0}, {512, 512});
  const TorchStreams torch;
  const Layouts layouts = matrix.files.layouts({});
  const Program program(layouts, matrix.items, matrix.destinations);
  {
    PinnedRing ring(8 * kMiB, 8 * kMiB, kMiB);
    transfer::run_wave(program, 0, {}, torch.targets(ring), never);
  }
  CHECK(matrix.arrived());
}

TEST_CASE("ring: the calling thread keeps its current context") {
  const Clean clean;
  const cuda::PrimaryContext last(other_device());
  for (const bool has_one : {false, true}) {
    CAPTURE(has_one);
    Matrix matrix(256, 256);
    matrix.want(0, {0, 0}, {256, 256}, 4);
    const TorchStreams torch;
    std::optional<cuda::CurrentContext> current;
    if (has_one) current.emplace(last);
    const ContextHandle before = current_context();
    CHECK(before == (has_one ? last.get() : nullptr));
    const Layouts layouts = matrix.files.layouts({});
    const Program program(layouts, matrix.items, matrix.destinations);
    std::optional<PinnedRing> ring(std::in_place, kMiB, kMiB, kMiB);
    const auto keeps = [&](const char* what, const auto& call) {
      call();
      CHECK_MESSAGE(current_context() == before, what);
    };
    transfer::Options options;
    options.threads = 1;  // the calling one
    keeps("run_wave", [&] { transfer::run_wave(program, 0, options, torch.targets(*ring), never); });
    keeps("synchronize", [&] { ring->synchronize(torch.targets(*ring).torch_streams, never); });
    keeps("drain", [&] { ring->drain(); });
    keeps("take_stats", [&] { static_cast<void>(ring->take_stats()); });
    keeps("device", [&] { static_cast<void>(ring->device(other_device())); });
    keeps("a device that does not exist", [&] { CHECK_THROWS_AS(ring->device(99), Error); });
    keeps("the end", [&] { ring.reset(); });
    CHECK(matrix.arrived());
  }
}

TEST_CASE("ring: waiting for torch's stream can be interrupted") {
  if (simulator() == nullptr) return;  // nothing else is slow enough
  const Clean clean;
  Matrix matrix(512, 512);
  matrix.want(0, {0, 0}, {512, 512}, 4);
  const TorchStreams torch;
  const Layouts layouts = matrix.files.layouts({});
  const Program program(layouts, matrix.items, matrix.destinations);
  PinnedRing ring(8 * kMiB, 8 * kMiB, kMiB);
  const SlowCopies slow(3000000);
  transfer::run_wave(program, 0, {}, torch.targets(ring), never);
  const auto start = std::chrono::steady_clock::now();
  CHECK_THROWS_AS(ring.synchronize(torch.targets(ring).torch_streams, [] { return true; }), Interrupted);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(2));
}

TEST_CASE("ring: what a load left under way does not count for the next one") {
  const Clean clean;
  Matrix matrix(512, 512);
  matrix.want(0, {0, 0}, {512, 512}, 4);
  const TorchStreams torch;
  const Layouts layouts = matrix.files.layouts({});
  const Program program(layouts, matrix.items, matrix.destinations);
  PinnedRing ring(8 * kMiB, 8 * kMiB, kMiB);
  transfer::run_wave(program, 0, {}, torch.targets(ring), never);
  CHECK(ring.take_stats().bytes_copied > 0);
  ring.synchronize(torch.targets(ring).torch_streams, never);
  const cuda::DeviceStats after = ring.take_stats();
  CHECK(after.bytes_copied == 0);
  CHECK(after.copy_seconds == 0);
}
