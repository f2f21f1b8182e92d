// Whether reading and copying overlap: both take a modelled time, and a load should take little more than the longer of
// the two. This says nothing of how fast either is.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device_load.h"
#include "doctest/doctest.h"
#include "faults.h"
#include "io/system_calls.h"
#include "test_device.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using Clock = std::chrono::steady_clock;

namespace {

constexpr double kGigabytesPerSecond = 0.25;
constexpr int64_t kRecordBytes = 4 * kMiB;
constexpr int64_t kSmallBytes = 1024;
// The first read and the last copy have nothing beside them: so many tensors that these two hardly count.
constexpr size_t kCount = 64;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A disk that serves one request after the other, whichever thread asks.
class SlowDisk final : public io::SystemCalls {
 public:
  explicit SlowDisk(double gigabytes_per_second) : bytes_per_second_(gigabytes_per_second * 1e9) {}

  ssize_t pread(int fd, void* buffer, size_t size, off_t offset) override {
    return take_time([&] { return SystemCalls::pread(fd, buffer, size, offset); });
  }
  ssize_t preadv(int fd, const iovec* vectors, int count, off_t offset) override {
    return take_time([&] { return SystemCalls::preadv(fd, vectors, count, offset); });
  }

  // When the first request came.
  Clock::time_point first_asked() const { return first_asked_; }
  double busy_seconds() const { return static_cast<double>(bytes_) / bytes_per_second_; }

 private:
  template <typename Read>
  ssize_t take_time(const Read& read) {
    const Clock::time_point asked = Clock::now();
    const ssize_t got = read();
    Clock::time_point end;
    {
      const std::scoped_lock lock(mutex_);
      if (bytes_ == 0) first_asked_ = asked;
      bytes_ += got;
      const std::chrono::duration<double> duration(static_cast<double>(got) / bytes_per_second_);
      free_at_ = std::max(asked, free_at_) + std::chrono::duration_cast<Clock::duration>(duration);
      end = free_at_;
    }
    std::this_thread::sleep_until(end);
    return got;
  }

  const double bytes_per_second_;
  std::mutex mutex_;
  Clock::time_point free_at_;
  Clock::time_point first_asked_;
  int64_t bytes_ = 0;
};

// Copies at a modelled speed. Races are not looked for, as that takes time that is not modelled.
class SlowLinks {
 public:
  SlowLinks() { set(kGigabytesPerSecond, 0); }
  ~SlowLinks() { set(0, 1); }
  SlowLinks(const SlowLinks&) = delete;
  SlowLinks& operator=(const SlowLinks&) = delete;

 private:
  static void set(double gigabytes_per_second, double races) {
    simulator()->set("copy_gbps", gigabytes_per_second);
    simulator()->set("races", races);
  }
};

// The driver takes its time for what only a first load needs.
class SlowStart {
 public:
  SlowStart() { set(50, 100, 0); }
  ~SlowStart() { set(0, 0, 1); }
  SlowStart(const SlowStart&) = delete;
  SlowStart& operator=(const SlowStart&) = delete;

 private:
  static void set(double pin_ms_per_64mb, double compile_ms, double poison) {
    simulator()->set("poison", poison);  // no driver does that
    simulator()->set("pin_ms_per_64mb", pin_ms_per_64mb);
    simulator()->set("compile_ms", compile_ms);
  }
};

// Tensors that alternate between devices, each wanted whole. Small ones, which come first, are placed by the kernel.
struct Tensors {
  Tensors(size_t count, const std::vector<int>& ordinals, size_t small = 0) : files(1) {
    for (size_t i = 0; i < small + count; ++i) {
      const auto bytes = static_cast<size_t>(i < small ? kSmallBytes : kRecordBytes);
      TensorSpec spec;
      spec.dtype = checkpoint::DType{0};
      spec.sizes = {static_cast<int64_t>(bytes) / checkpoint::info(spec.dtype).itemsize};
      spec.strides = {1};
      spec.storage_elements = spec.sizes[0];
      files.add(0, spec, std::string(bytes, static_cast<char>('a' + i % 26)));
      const int ordinal = ordinals[i % ordinals.size()];
      memories.push_back(std::make_unique<DeviceBytes>(ordinal, std::string(bytes, '#')));
      transfer::Destination destination;
      destination.data = memories.back()->address();
      destination.device = ordinal;
      destination.dtype = spec.dtype;
      destination.sizes = spec.sizes;
      destination.strides = spec.strides;
      destinations.push_back(destination);
      transfer::Item item;
      item.record = i;
      item.destination = i;
      item.storage_offsets = {0};
      item.destination_offsets = {0};
      item.lengths = spec.sizes;
      items.push_back(item);
    }
    files.write();
  }

  // Mapped files would be read without a request to the slow disk.
  transfer::Layouts layouts() const { return files.layouts({}, io::IoMode::kCached); }

  bool arrived() const {
    for (size_t i = 0; i < memories.size(); ++i) {
      if (memories[i]->download() != files.stored[i].storage) return false;
    }
    return true;
  }

  CheckpointFiles files;
  std::vector<transfer::Destination> destinations;
  std::vector<transfer::Item> items;
  std::vector<std::unique_ptr<DeviceBytes>> memories;
};

struct Measured {
  double seconds = 0;
  double seconds_to_first_read = 0;
  double efficiency = 0;
  double copy_seconds = 0;           // by the engine
  double modelled_copy_seconds = 0;  // of the busiest link
};

Measured load(const Tensors& tensors, Gpu& gpu, double disk_gigabytes_per_second) {
  const transfer::Layouts layouts = tensors.layouts();
  const transfer::Program program(layouts, tensors.items, tensors.destinations);
  simulator()->busy_seconds(-1, "copy", 1);
  SlowDisk disk(disk_gigabytes_per_second);
  Measured measured;
  {
    const ScopedCalls scope(disk);
    const SlowLinks links;
    transfer::Options options;
    options.threads = 4;
    const Clock::time_point start = Clock::now();
    gpu.run(program, options);
    gpu.synchronize();
    measured.seconds = seconds_since(start);
    measured.seconds_to_first_read = std::chrono::duration<double>(disk.first_asked() - start).count();
  }
  REQUIRE(disk.busy_seconds() > 0);
  for (const int ordinal : {0, 1}) {
    measured.modelled_copy_seconds =
        std::max(measured.modelled_copy_seconds, simulator()->busy_seconds(ordinal, "copy", 0));
  }
  measured.copy_seconds = gpu.ring.take_stats().copy_seconds;
  measured.efficiency = std::max(disk.busy_seconds(), measured.modelled_copy_seconds) / measured.seconds;
  return measured;
}

bool as_modelled(const Measured& measured) {
  return measured.copy_seconds == doctest::Approx(measured.modelled_copy_seconds).epsilon(0.1);
}

// Sanitizers make the processor slow, which the modelled disk and links are not.
#ifdef __SANITIZE_ADDRESS__
constexpr double kSlack = 0.08;
#else
constexpr double kSlack = 0;
#endif
constexpr int kMostAttempts = 20;

// The best of a few: threads of a busy machine wake up late, but nothing makes a load faster than it can be.
Measured best_load(const Tensors& tensors, double disk_gigabytes_per_second, double enough) {
  Measured best;
  for (int attempt = 0; attempt < kMostAttempts && !(best.efficiency >= enough && as_modelled(best)); ++attempt) {
    Gpu gpu;
    const Measured measured = load(tensors, gpu, disk_gigabytes_per_second);
    if (measured.efficiency > best.efficiency || (measured.efficiency >= enough && as_modelled(measured)))
      best = measured;
  }
  MESSAGE("overlap efficiency " << best.efficiency << ", copies took " << best.copy_seconds << " s of modelled "
                                << best.modelled_copy_seconds << " s");
  return best;
}

}  // namespace

TEST_CASE("overlap: reading and copying go on at the same time") {
  if (simulator() == nullptr) return;
  const Clean clean;
  const Tensors tensors(kCount, {0});
  const Measured measured = best_load(tensors, kGigabytesPerSecond, 0.95 - kSlack);
  CHECK(measured.efficiency >= 0.95 - kSlack);
  CHECK(as_modelled(measured));
  CHECK(tensors.arrived());
}

TEST_CASE("overlap: two devices are copied to at the same time") {
  if (simulator() == nullptr || other_device() == 0) return;
  const Clean clean;
  const Tensors tensors(2 * kCount, {0, 1});
  const Measured measured = best_load(tensors, 2 * kGigabytesPerSecond, 0.9 - kSlack);
  CHECK(measured.efficiency >= 0.9 - kSlack);
  CHECK(as_modelled(measured));
  CHECK(tensors.arrived());
}

TEST_CASE("overlap: the first load reads while memory is pinned and the kernel compiled") {
  if (simulator() == nullptr) return;
  const Clean clean;
  constexpr size_t kSmall = 32;
  const Tensors tensors(24, {0}, kSmall);
  double least_first = 100;
  double least_second = 100;
  double least_wait = 100;
  // The best of each: a slow second load must not hide a slow first one.
  const auto extra = [&] { return least_first - least_second; };
  for (int attempt = 0; attempt < 20 && (attempt < 3 || extra() > 0.03 || least_wait > 0.01); ++attempt) {
    Gpu gpu;
    Measured first;
    {
      const SlowStart slow;
      first = load(tensors, gpu, kGigabytesPerSecond);
    }
    CHECK(gpu.ring.device_bytes() > 0);  // or no kernel was wanted
    const Measured second = load(tensors, gpu, kGigabytesPerSecond);
    least_first = std::min(least_first, first.seconds);
    least_second = std::min(least_second, second.seconds);
    least_wait = std::min(least_wait, first.seconds_to_first_read);
  }
  MESSAGE("the first load took " << extra() << " s more than the second, and began to read after " << least_wait
                                 << " s");
  CHECK(extra() <= 0.03);
  CHECK(least_wait <= 0.01);
  CHECK(tensors.arrived());
}

TEST_CASE("overlap: after prepare the first load pins nothing and compiles nothing") {
  if (simulator() == nullptr) return;
  const Clean clean;
  const Tensors tensors(4, {0}, 32);
  Gpu gpu;
  gpu.ring.prepare(0);
  CHECK(gpu.ring.pinned_bytes() == static_cast<int64_t>(gpu.ring.slots() * gpu.ring.slot_bytes()));
  const char* const calls[] = {"cuMemHostRegister_v2", "cuModuleLoadData", "cuMemAlloc_v2", "cuEventCreate"};
  std::vector<long> before;
  for (const char* call : calls) before.push_back(simulator()->calls(call));
  load(tensors, gpu, 100);
  for (size_t i = 0; i < before.size(); ++i) CHECK(simulator()->calls(calls[i]) == before[i]);
  CHECK(tensors.arrived());
}

// A load that is converted on the device: stored tensors arrive in one of two memories in turns, and torch's stream
// then makes of them what is wanted.
TEST_CASE("overlap: conversions on the device take turns with what they convert, and nothing stops for them") {
  if (simulator() == nullptr) return;
  const Clean clean;
  constexpr size_t kPerProgram = 4;
  const Tensors tensors(kCount, {0});
  const std::string empty(static_cast<size_t>(kRecordBytes), '#');
  std::vector<std::unique_ptr<DeviceBytes>> memories;
  for (size_t i = 0; i < 2 * kPerProgram; ++i) memories.push_back(std::make_unique<DeviceBytes>(0, empty));
  double best = 0;
  for (int attempt = 0; attempt < kMostAttempts && best < 0.9 - kSlack; ++attempt) {
    const transfer::Layouts layouts = tensors.layouts();
    std::vector<std::unique_ptr<transfer::Program>> programs;
    std::vector<const transfer::Program*> pointers;
    for (size_t first = 0; first < tensors.items.size(); first += kPerProgram) {
      std::vector<transfer::Item> items;
      std::vector<transfer::Destination> destinations;
      for (size_t i = first; i < first + kPerProgram; ++i) {
        items.push_back(tensors.items[i]);
        items.back().destination = i - first;
        destinations.push_back(tensors.destinations[i]);
        destinations.back().data = memories[i % memories.size()]->address();
      }
      programs.push_back(std::make_unique<transfer::Program>(layouts, items, destinations));
      pointers.push_back(programs.back().get());
    }
    for (const auto& memory : tensors.memories) memory->upload(empty);
    Gpu gpu;
    SlowDisk disk(kGigabytesPerSecond);
    const ScopedCalls scope(disk);
    const SlowLinks links;
    transfer::Options options;
    options.threads = 4;
    const Clock::time_point start = Clock::now();
    transfer::run_programs(pointers, options, gpu.targets, never, [&](size_t program) {
      for (size_t i = program * kPerProgram; i < (program + 1) * kPerProgram; ++i) {
        gpu.streams[0].copy(*tensors.memories[i], *memories[i % memories.size()], empty.size());
      }
    });
    gpu.synchronize();
    REQUIRE(disk.busy_seconds() > 0);
    best = std::max(best, disk.busy_seconds() / seconds_since(start));
    REQUIRE(tensors.arrived());
  }
  MESSAGE("overlap efficiency " << best);
  CHECK(best >= 0.9 - kSlack);
}

TEST_CASE("overlap: there is none with a single slot, and the measurement shows it") {
  if (simulator() == nullptr) return;
  const Clean clean;
  const Tensors tensors(4, {0});
  Gpu gpu(0, 0);
  CHECK(gpu.ring.slots() == 1);
  CHECK(load(tensors, gpu, kGigabytesPerSecond).efficiency < 0.8);
  CHECK(tensors.arrived());
}
