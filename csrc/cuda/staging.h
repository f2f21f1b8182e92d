// What loads to GPUs share and reuse: the pinned ring, and the devices that were loaded to.
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

// One slot, to be filled by the thread that holds it. Goes back to the ring unless it was submitted.
class SlotLease;

// Used by one load at a time; its member functions, except for those of the ring, by one thread.
class Staging {
 public:
  // `pinned_bytes` of host memory, and at most `device_bytes` on each device, in slots that carry boxes of up to
  // `block_bytes`, or less if there is not memory enough for some of those. Each slot is pinned when it is first
  // needed, by the thread that needs it: reading need not wait for the rest of the ring.
  Staging(int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

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
  // can be pinned, Error(kCuda) if the work that a slot was submitted for failed, and the error of `fail`, after which
  // a staging is good for nothing.
  SlotLease acquire(Device& device);
  void fail(const Error& error);

  // The host waits for what torch's streams have now, and for the work of all slots. Throws Error(kCuda) if that
  // failed, Interrupted.
  void synchronize(const std::map<int, StreamHandle>& torch_streams, const std::function<bool()>& interrupted);
  // After an error: waits until no device uses a slot or a destination any more.
  void drain() noexcept;

  // At the end of a load: what all devices did in it. Recorders are forgotten.
  DeviceStats take_stats();
  // Likewise: for how long threads waited for slots, summed over them.
  double take_slot_seconds();

 private:
  friend class SlotLease;

  struct Slot {
    std::unique_ptr<PinnedMemory> memory;
    Device* user = nullptr;  // whose work is to be waited for
  };

  void submit(size_t slot, Device& device, const SlotPlan& plan);
  void give_back(size_t slot);
  bool is_done(size_t slot);
  void wait(size_t slot);
  bool pin_one(Device& device, std::unique_lock<std::mutex>& lock);
  void pin(size_t slot, Device& device);

  const int64_t block_bytes_;
  const size_t slot_bytes_;
  io::AlignedBuffer ring_;  // where slots lie, unless the driver wants memory of its own
  std::map<int, Device> devices_;
  std::vector<Slot> slots_;
  mutable std::mutex mutex_;  // for what follows
  std::condition_variable returned_;
  std::deque<size_t> order_;   // pinned slots that nobody holds; those that were submitted first come first
  std::vector<size_t> fresh_;  // slots that are not pinned yet
  size_t pinning_ = 0;         // how many threads pin one
  size_t pinned_ = 0;
  std::optional<Error> error_;
  double slot_seconds_ = 0;
};

class SlotLease {
 public:
  SlotLease(Staging& staging, size_t slot) : staging_(&staging), slot_(slot) {}
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
  Staging* staging_;
  size_t slot_;
};

}  // namespace dcp_fast::cuda
