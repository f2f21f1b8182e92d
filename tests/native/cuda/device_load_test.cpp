// Loads into the memory of GPUs, on whatever driver there is: the simulator, or a real one.

#include "device_load.h"

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "test_device.h"
#include "transfer/engine.h"
#include "transfer/workers.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using cuda::DeviceStats;
using cuda::PinnedRing;
using transfer::CudaTargets;
using transfer::Destination;
using transfer::Layouts;
using transfer::Options;
using transfer::Program;
using Kind = transfer::Transfer::Kind;

namespace {

DeviceStats load(const Matrix& matrix, Gpu& gpu, const Options& options = {}, io::IoMode mode = io::IoMode::kAuto) {
  const Layouts layouts = matrix.files.layouts(options, mode);
  const Program program(layouts, matrix.items, matrix.destinations);
  gpu.run(program, options);
  gpu.synchronize();
  return gpu.ring.take_stats();
}

}  // namespace

TEST_CASE("device: any boxes, devices, layouts, ring and block sizes give what an element-wise load gives") {
  const Clean clean;
  Random random(200);
  int64_t launches = 0;
  int64_t straight = 0;
  const std::vector<int> ordinals = {transfer::kHost, 0, other_device()};
  for (int i = 0; i < 300; ++i) {
    CAPTURE(i);
    RandomLoad load(random, ordinals.size());
    std::vector<std::unique_ptr<DeviceBytes>> memories;
    std::string host = load.before[0];
    load.place(0, data_of(host));
    for (size_t m = 1; m < ordinals.size(); ++m) {
      memories.push_back(std::make_unique<DeviceBytes>(ordinals[m], load.before[m]));
      load.place(m, memories.back()->address());
    }
    for (size_t d = 0; d < load.destinations.size(); ++d) {
      if (load.destinations[d].device == transfer::kHost) load.destinations[d].device = ordinals[load.memory_of[d]];
    }
    Gpu gpu(random.pick(std::vector<int64_t>{0, 200000, kMiB, 8 * kMiB}),
            random.pick(std::vector<int64_t>{1, 65536, 100001, 4 * kMiB}));
    const Options options = random_options(random);
    const Layouts layouts = load.files.layouts(options, random_mode(random));
    const Program program(layouts, load.items, load.destinations);
    for (int32_t wave = 0; wave < program.waves(); ++wave) {
      transfer::run_wave(program, wave, options, gpu.targets, never);
      gpu.synchronize();
      for (const size_t item : program.items_in_wave(wave)) {  // torch's part
        if (program.transfers()[item].kind == Kind::kDirect) continue;
        const size_t d = load.items[item].destination;
        const size_t memory = load.memory_of[d];
        Destination destination = load.destinations[d];
        std::string bytes = memory == 0 ? std::string() : memories[memory - 1]->download();
        if (memory != 0) destination.data = data_of(bytes) + load.starts[d];
        copy_item(load.files, program.items()[item], destination, memory != 0);
        if (memory != 0) memories[memory - 1]->upload(bytes);
      }
    }
    const DeviceStats stats = gpu.ring.take_stats();
    launches += stats.launches;
    straight += stats.copies - stats.launches;
    REQUIRE(host == load.expected[0]);
    for (size_t m = 1; m < ordinals.size(); ++m) REQUIRE(memories[m - 1]->download() == load.expected[m]);
    REQUIRE(take_reports() == "");
  }
  CHECK(launches > 200);
  CHECK(straight > 3);
}

TEST_CASE("device: rows and columns are sliced on the host and copied straight, without a launch") {
  const Clean clean;
  Matrix matrix(2048, 2048);
  matrix.want(0, {256, 0}, {256, 2048});
  matrix.want(0, {0, 256}, {2048, 256});
  Gpu gpu;
  const DeviceStats stats = load(matrix, gpu);
  CHECK(stats.launches == 0);
  CHECK(stats.bytes_copied == 2 * 2048 * 256 * matrix.itemsize);
  CHECK(stats.copies <= 5);
  CHECK(stats.copy_seconds > 0);
  CHECK(matrix.arrived());
  CHECK(gpu.ring.device_bytes() == 0);
  CHECK(gpu.ring.pinned_bytes() <= 64 * kMiB);
}

TEST_CASE("device: a large load takes one copy a slot, whatever the number of threads") {
  const Clean clean;
  Matrix matrix(4096, 64 * kMiB / 4096 / checkpoint::info(checkpoint::DType{0}).itemsize);
  matrix.want(0, {0, 0}, matrix.sizes);
  for (const io::IoMode mode : {io::IoMode::kCached, io::IoMode::kDirect}) {
    for (const int threads : {1, 2, 3, 4, 8, 16, 32, 64}) {
      CAPTURE(threads);
      Gpu gpu;
      Options options;
      options.threads = threads;
      options.staging_bytes = 16 * kMiB;  // half of what a reader has by default: 64 threads get 256 KiB each
      const DeviceStats stats = load(matrix, gpu, options, mode);
      CHECK(stats.bytes_copied == 64 * kMiB);
      CHECK(stats.copies <= 64 * kMiB / static_cast<int64_t>(gpu.ring.slot_bytes()) * 11 / 10);
      CHECK(stats.launches == 0);
    }
  }
  CHECK(matrix.arrived());
}

TEST_CASE("device: a destination with gaps is filled by the kernel") {
  const Clean clean;
  Matrix matrix(2048, 1024);
  matrix.want(0, {0, 0}, {2048, 1024}, 3);
  matrix.want(other_device(), {5, 7}, {1000, 900}, 1);
  Gpu gpu;
  const DeviceStats stats = load(matrix, gpu);
  CHECK(stats.launches > 1);
  CHECK(stats.launches == stats.copies);
  CHECK(matrix.arrived());
}

TEST_CASE("device: a small ring carries a large load, straight and by the kernel") {
  const Clean clean;
  const SlowCopies slow(500);
  Matrix matrix(512, 512);
  for (const int ordinal : {0, other_device()}) {
    matrix.want(ordinal, {0, 0}, {512, 512}, 4);
    matrix.want(ordinal, {0, 0}, {512, 512});
  }
  Gpu gpu(kMiB / 4, 65536);
  CHECK(gpu.ring.slots() == 3);
  CHECK(load(matrix, gpu).copies >= 4 * kMiB / 65536);
  CHECK(matrix.arrived());
}

TEST_CASE("device: programs in turns write two memories, whose contents torch's stream takes away") {
  const Clean clean;
  const SlowCopies slow(500);
  constexpr int64_t kRows = 64;
  Matrix matrix(12 * kRows, 1024);
  for (int64_t first = 0; first < matrix.sizes[0]; first += kRows) matrix.want(0, {first, 0}, {kRows, 1024});
  const std::string empty(matrix.expected[0].size(), '#');
  std::vector<std::unique_ptr<DeviceBytes>> memories;
  for (int i = 0; i < 2; ++i) memories.push_back(std::make_unique<DeviceBytes>(0, empty));
  Gpu gpu(kMiB, 65536);
  const Layouts layouts = matrix.files.layouts({});
  std::vector<std::unique_ptr<Program>> programs;
  std::vector<const Program*> pointers;
  for (size_t i = 0; i < matrix.items.size(); ++i) {
    transfer::Item item = matrix.items[i];
    item.destination = 0;
    Destination destination = matrix.destinations[i];
    destination.data = memories[i % 2]->address();
    programs.push_back(std::make_unique<Program>(layouts, std::vector{item}, std::vector{destination}));
    pointers.push_back(programs.back().get());
  }
  Options options;
  options.threads = 3;
  std::vector<size_t> order;
  transfer::run_programs(pointers, options, gpu.targets, never, [&](size_t i) {
    order.push_back(i);
    gpu.streams[0].copy(*matrix.memories[i], *memories[i % 2], empty.size());
  });
  gpu.synchronize();
  CHECK(matrix.arrived());
  REQUIRE(order.size() == programs.size());
  for (size_t i = 0; i < order.size(); ++i) CHECK(order[i] == i);
}

TEST_CASE("device: many small boxes take one copy and one launch a slot") {
  const Clean clean;
  constexpr int64_t kRows = 4000;
  Matrix matrix(kRows, 512);
  for (int64_t row = 0; row < kRows; ++row) matrix.want(0, {row, 0}, {1, 512});
  Gpu gpu;
  const DeviceStats stats = load(matrix, gpu);
  const int64_t bytes = kRows * 512 * matrix.itemsize;
  CHECK(stats.launches == stats.copies);
  CHECK(stats.copies <= bytes / static_cast<int64_t>(gpu.ring.slot_bytes()) * 11 / 10 + 1);
  CHECK(matrix.arrived());
}

TEST_CASE("device: torch's work before the load is waited for, torch's work after it waits") {
  const Clean clean;
  Matrix matrix(1024, 1024);
  matrix.want(0, {0, 0}, {1024, 1024}, 1);
  matrix.want(0, {0, 0}, {1024, 1024});
  Gpu gpu;
  const cuda::PrimaryContext context(0);
  const cuda::CurrentContext current(context);
  io::AlignedBuffer buffers[2];
  std::vector<std::unique_ptr<cuda::PinnedMemory>> pinned;
  const TorchStream& torch = gpu.streams[0];
  for (size_t i = 0; i < 2; ++i) torch.fill(*matrix.memories[i], matrix.expected[i].size(), '#');
  const Layouts layouts = matrix.files.layouts({});
  const Program program(layouts, matrix.items, matrix.destinations);
  Options options;
  options.threads = 1;  // the straight copy comes last, so that waiting for the kernel does not cover for it
  gpu.run(program, options);
  for (size_t i = 0; i < 2; ++i) {
    const size_t bytes = matrix.expected[i].size();
    pinned.push_back(std::make_unique<cuda::PinnedMemory>(buffers[i].reserve(bytes), bytes));
    torch.download(pinned[i]->data(), *matrix.memories[i], bytes);
  }
  torch.synchronize();
  for (size_t i = 0; i < 2; ++i) {
    const std::string got(reinterpret_cast<const char*>(pinned[i]->data()), matrix.expected[i].size());
    CHECK((got == matrix.expected[i]));
  }
}

TEST_CASE("device: the ring is used again by the next load, and nothing is left in the end") {
  const Clean clean;
  const long before = simulator() != nullptr ? simulator()->calls("cuMemHostRegister_v2") : 0;
  {
    Gpu gpu;
    for (int i = 0; i < 3; ++i) {
      Matrix matrix(512, 1024);
      matrix.want(0, {0, 0}, {512, 1024}, i);
      load(matrix, gpu);
      CHECK(matrix.arrived());
    }
  }
  if (simulator() != nullptr) CHECK(simulator()->calls("cuMemHostRegister_v2") == before + 1);
}

TEST_CASE("device: no context is made on a device that nothing goes to") {
  if (simulator() == nullptr) return;
  const Clean clean;
  PinnedRing ring(kMiB, kMiB, kMiB);
  Matrix matrix(64, 64);
  matrix.want(0, {0, 0}, {64, 64});
  const TorchStream torch(0);
  const long before = simulator()->calls("cuDevicePrimaryCtxRetain");
  CudaTargets targets;
  targets.ring = &ring;
  targets.torch_streams[0] = torch.get();
  const Layouts layouts = matrix.files.layouts({});
  const Program program(layouts, matrix.items, matrix.destinations);
  transfer::run_wave(program, 0, {}, targets, never);
  ring.synchronize(targets.torch_streams, never);
  CHECK(simulator()->calls("cuDevicePrimaryCtxRetain") == before + 1);
}

TEST_CASE("device: a read that fails is an error with item, record and path, and no device writes any more") {
  const Clean clean;
  const SlowCopies slow(500);
  for (const int64_t nth : {0, 1, 5, 20}) {
    Matrix matrix(4096, 1024);
    matrix.want(0, {0, 0}, {4096, 1024}, 1);
    Gpu gpu(kMiB, 65536);
    const Layouts layouts = matrix.files.layouts({});
    const Program program(layouts, matrix.items, matrix.destinations);
    io::FaultySystemCalls calls(fault(io::FaultFunction::kPread, nth, EIO));
    const ScopedCalls scope(calls);
    std::optional<Error> error;
    try {
      gpu.run(program, {});
    } catch (const Error& thrown) {
      error = thrown;
    }
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kIo);
    CHECK(error->error_number == EIO);
    CHECK(error->item == 0);
    CHECK(error->record == 0);
    CHECK(error->path == matrix.files.paths[0]);
    matrix.memories.clear();  // as a caller may from here on
  }
}

TEST_CASE("device: an interruption ends the load, and no device writes any more") {
  const Clean clean;
  const SlowCopies slow_copies(500);
  Matrix matrix(4096, 1024);
  matrix.want(0, {0, 0}, {4096, 1024}, 1);
  Gpu gpu(kMiB, 65536);
  const Layouts layouts = matrix.files.layouts({});
  const Program program(layouts, matrix.items, matrix.destinations);
  class Slow final : public io::SystemCalls {
    ssize_t pread(int fd, void* buffer, size_t size, off_t offset) override {
      wait();
      return SystemCalls::pread(fd, buffer, size, offset);
    }
    ssize_t preadv(int fd, const iovec* vectors, int count, off_t offset) override {
      wait();
      return SystemCalls::preadv(fd, vectors, count, offset);
    }
    // Longer than a load goes on without asking.
    static void wait() { std::this_thread::sleep_for(std::chrono::milliseconds(400)); }
  };
  Slow slow;
  const ScopedCalls scope(slow);
  Options options;
  options.threads = 2;
  CHECK_THROWS_AS(transfer::run_wave(program, 0, options, gpu.targets, [] { return true; }), Interrupted);
  matrix.memories.clear();
}
