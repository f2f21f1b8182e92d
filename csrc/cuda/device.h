// One GPU during loads: a stream for copies, one for the kernel, staging memory, and the events that order them.
//
//   torch's stream ──begin──> copy stream:   [slot 0][slot 1]...          ──end──> torch's stream
//                             kernel stream:        [slot 0][slot 1]...   ──end──>
//
// A slot's kernel waits for the slot's copies. A slot is filled again when its last work is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/resources.h"
#include "cuda/slot.h"
#include "trace/recorder.h"

namespace dcp_fast::cuda {

struct DeviceStats {
  int64_t bytes_copied = 0;
  int64_t copies = 0;
  int64_t launches = 0;
  double copy_seconds = 0;  // that the copies of finished slots took on the device

  // With another device's that was at work at the same time: its time does not come on top.
  DeviceStats& join(const DeviceStats& other);
};

class Device {
 public:
  Device(int ordinal, size_t slots, size_t slot_bytes);
  // Waits for what is under way.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const { return ordinal_; }
  const PrimaryContext& context() const { return context_; }
  int64_t staging_bytes() const { return staging_ ? static_cast<int64_t>(slots_.size() * slot_bytes_) : 0; }

  // Does work with the device's context; errors name the device.
  void in_context(const std::function<void()>& work) const;

  // What is submitted from here on waits for the work that torch's stream has now.
  void begin(StreamHandle torch_stream, trace::Recorder* recorder);

  // Allocates staging memory, and has the driver compile the kernel. Needed once, before a plan with entries.
  void prepare_to_launch();

  // Enqueues the copies of a slot, and the launch that places its boxes. Thread-safe.
  void submit(size_t slot, const std::byte* memory, const SlotPlan& plan);

  // Waits until the work that a slot was last submitted for is done. Throws Error(kCuda) if it failed.
  void wait(size_t slot);

  // Torch's stream waits for all that was submitted.
  void end(StreamHandle torch_stream);

  // The host waits for what torch's stream has now. Throws Interrupted if `interrupted` says so.
  void synchronize(StreamHandle torch_stream, const std::function<bool()>& interrupted);

  // Waits for all that was submitted, whatever became of it.
  void drain() noexcept;

  // At the end of a load: what was done in it. The recorder is forgotten.
  DeviceStats take_stats();

 private:
  struct Slot {
    Event copy_begin;
    Event copied;
    Event kernel_begin;
    Event placed;
    uint32_t bytes = 0;         // that are copied
    uint32_t staged_bytes = 0;  // that the kernel places, with their descriptors
    bool launched = false;
    bool timed = true;  // its times are in the stats
  };

  void release() noexcept;
  void in_context_if_possible(const std::function<void()>& work) const noexcept;
  void launch(const Slot& slot, DeviceAddress staging, const SlotPlan& plan);
  void count_times(Slot& slot);

  const int ordinal_;
  const size_t slot_bytes_;
  PrimaryContext context_;
  std::mutex mutex_;  // for what follows
  Stream copy_stream_;
  Stream kernel_stream_;
  std::vector<Slot> slots_;
  Event began_;         // with a recorder: on the copy stream, at its time `began_at_`
  Event torch_before_;  // on torch's stream
  Event torch_after_;   // likewise
  Event copies_done_;
  Event kernels_done_;
  DeviceMemory staging_;  // for every slot; only once a box needs it
  Module module_;
  FunctionHandle function_ = nullptr;
  DeviceStats stats_;
  trace::Recorder* recorder_ = nullptr;
  int64_t began_at_ = 0;
};

}  // namespace dcp_fast::cuda
