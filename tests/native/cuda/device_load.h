// What the tests of loads to GPUs share: a stored matrix with parts of it wanted on devices, torch's streams and
// a pinned ring, and a check that the driver had nothing to complain of.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "test_device.h"
#include "transfer/engine.h"
#include "transfer/random_load.h"

namespace dcp_fast::testing {

constexpr int64_t kMiB = 1 << 20;

// Whether a second device can take part, on a machine with a single one too.
inline int other_device() { return has_device(1) ? 1 : 0; }

// One stored matrix, and parts of it wanted on devices.
struct Matrix {
  Matrix(int64_t rows, int64_t columns) : sizes{rows, columns}, files(1) {
    Random random(7);
    files.add_random(random, 0, checkpoint::DType{0}, sizes, true);
    itemsize = checkpoint::info(checkpoint::DType{0}).itemsize;
    files.write();
  }

  // Wants a box of it, as a tensor whose rows are `padding` elements further apart than they need be.
  void want(int ordinal, Ints offsets, Ints lengths, int64_t padding = 0) {
    transfer::Destination destination;
    destination.device = ordinal;
    destination.dtype = checkpoint::DType{0};
    destination.sizes = lengths;
    destination.strides = {lengths[1] + padding, 1};
    const auto bytes = static_cast<size_t>(span_of(destination.sizes, destination.strides) * itemsize);
    expected.emplace_back(bytes, '#');
    memories.push_back(std::make_unique<DeviceBytes>(ordinal, expected.back()));
    transfer::Item item;
    item.destination = destinations.size();
    item.storage_offsets = std::move(offsets);
    item.destination_offsets = {0, 0};
    item.lengths = std::move(lengths);
    transfer::Destination on_host = destination;
    on_host.data = data_of(expected.back());
    copy_item(files, item, on_host);
    destination.data = memories.back()->address();
    destinations.push_back(destination);
    items.push_back(item);
  }

  bool arrived() const {
    for (size_t i = 0; i < memories.size(); ++i) {
      if (memories[i]->download() != expected[i]) return false;
    }
    return true;
  }

  Ints sizes;
  int64_t itemsize = 0;
  CheckpointFiles files;
  std::vector<transfer::Destination> destinations;
  std::vector<transfer::Item> items;
  std::vector<std::string> expected;
  std::vector<std::unique_ptr<DeviceBytes>> memories;
};

// Torch's current streams on all devices.
struct TorchStreams {
  TorchStreams() {
    for (const int ordinal : {0, other_device()}) {
      if (!streams[ordinal]) streams[ordinal].emplace(ordinal);
    }
  }

  const TorchStream& operator[](int ordinal) const { return *streams[ordinal]; }

  transfer::CudaTargets targets(cuda::PinnedRing& ring) const {
    transfer::CudaTargets result;
    result.ring = &ring;
    for (const int ordinal : {0, 1}) {
      if (streams[ordinal]) result.torch_streams[ordinal] = streams[ordinal]->get();
    }
    return result;
  }

  std::optional<TorchStream> streams[2] = {};
};

// They and a pinned ring.
struct Gpu {
  explicit Gpu(int64_t pinned_bytes = 64 * kMiB, int64_t block_bytes = 4 * kMiB)
      : ring(pinned_bytes, pinned_bytes, block_bytes), targets(streams.targets(ring)) {}

  transfer::Stats run(const transfer::Program& program, const transfer::Options& options) {
    transfer::Stats stats;
    for (int32_t wave = 0; wave < program.waves(); ++wave) {
      stats = transfer::run_wave(program, wave, options, targets, never);
    }
    return stats;
  }

  void synchronize() { ring.synchronize(targets.torch_streams, never); }

  TorchStreams streams;
  cuda::PinnedRing ring;
  transfer::CudaTargets targets;
};

// Copies take a while, on a simulator.
class SlowCopies {
 public:
  explicit SlowCopies(double microseconds) { set(microseconds); }
  ~SlowCopies() { set(0); }
  SlowCopies(const SlowCopies&) = delete;
  SlowCopies& operator=(const SlowCopies&) = delete;

 private:
  static void set(double microseconds) {
    if (simulator() != nullptr) simulator()->set("latency_us", microseconds);
  }
};

// Checks after every test that the driver had nothing to complain of.
struct Clean {
  ~Clean() {
    CHECK(take_reports() == "");  // NOLINT(bugprone-exception-escape): doctest's own
    CHECK(leaks() == "");
  }
};

}  // namespace dcp_fast::testing
