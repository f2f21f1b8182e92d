// The pinned ring, and the devices that it feeds. Loads to GPUs reuse both, one load after another.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda/device.h"
#include "cuda/pinned.h"
#include "cuda/slot.h"
#include "error.h"
#include "io/buffer.h"

namespace dcp_fast::cuda {

class SlotLease;

// One load uses a ring at a time. acquire(), fail() and slots are for any thread, all else is for the one that loads.
class PinnedRing {
 public:
  // `pinned_bytes` of host memory, and at most `device_bytes` on each device, in slots that carry boxes of up to
  // `block_bytes`, or less if there is not memory enough for some of those. Each slot is pinned when it is first
  // needed, by the thread that needs it: reading need not wait for the rest of the ring.
  PinnedRing(int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes);
  ~PinnedRing();
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;

  // The largest box that always fits a slot.
  int64_t block_bytes() const { return block_bytes_; }
  size_t slot_bytes() const { return slot_bytes_; }
  size_t slots() const { return slots_.size(); }
  int64_t pinned_bytes() const;
  // The most that any device holds.
  int64_t device_bytes() const;

  // Makes a device ready on its first use. Throws Error(kCuda, kCudaOutOfMemory), std::bad_alloc.
  Device& device(int ordinal);

  // Pins the whole ring, near the device, and loads the kernel: the first load need not. Throws as device() does, and
  // Error(kCudaRefused).
  void prepare(int ordinal);

  // Waits for a slot that is to be submitted to a device. Thread-safe. Throws Error(kCudaRefused) if no memory at all
  // can be pinned, Error(kCuda) if the last work of a slot failed, and the error of fail().
  SlotLease acquire(Device& device);
  // Lets all threads that wait for slots throw an error. The ring cannot be used any more. Thread-safe.
  void fail(const Error& error);

  // The host waits for what torch's streams have now, and for the work of all slots. Throws Error(kCuda) if that
  // failed, Interrupted.
  void synchronize(const std::map<int, StreamHandle>& torch_streams, const std::function<bool()>& interrupted);
  // After an error: waits until no device uses a slot or a destination any more.
  void drain() noexcept;

  // Returns what all devices did in a load, at its end, and drops the recorders.
  DeviceStats take_stats();
  // Returns for how long threads waited for slots in a load, summed over the threads.
  double take_slot_seconds();

 private:
  friend class SlotLease;

  struct Slot {
    std::unique_ptr<PinnedMemory> memory;
    Device* user = nullptr;  // the device whose work must be done before the slot is filled again
  };

  void submit(size_t slot, Device& device, const SlotPlan& plan);
  void give_back(size_t slot);
  bool is_done(size_t slot);
  void wait(size_t slot);
  bool pin_one(Device& device, std::unique_lock<std::mutex>& lock);
  void pin(size_t slot, Device& device);

  const int64_t block_bytes_;
  const size_t slot_bytes_;
  io::AlignedBuffer memory_;  // of the slots, unless the driver gave memory of its own
  std::map<int, Device> devices_;
  std::vector<Slot> slots_;
  mutable std::mutex mutex_;  // for what follows
  std::condition_variable returned_;
  std::deque<size_t> order_;   // pinned slots that nobody holds, in the order in which they were submitted
  std::vector<size_t> fresh_;  // slots that are not pinned yet
  size_t pinning_ = 0;         // how many threads pin one
  size_t pinned_ = 0;
  std::optional<Error> error_;
  double slot_seconds_ = 0;
};

// A slot that one thread holds and fills. It goes back to the ring unless it is submitted.
class SlotLease {
 public:
  SlotLease(PinnedRing& ring, size_t slot) : ring_(&ring), slot_(slot) {}
  ~SlotLease();
  SlotLease(SlotLease&& other) noexcept;
  SlotLease(const SlotLease&) = delete;
  SlotLease& operator=(const SlotLease&) = delete;
  SlotLease& operator=(SlotLease&&) = delete;

  size_t slot() const { return slot_; }
  std::byte* data() const;
  // Announces a write of the first `bytes`, to a simulator.
  void about_to_write(size_t bytes) const;
  // Enqueues what the plan says. Throws Error(kCuda); the slot is then lost, as a part of the work may be under way.
  void submit(Device& device, const SlotPlan& plan) &&;

 private:
  PinnedRing* ring_;
  size_t slot_;
};

}  // namespace dcp_fast::cuda
