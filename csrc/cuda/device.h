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
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/dequantize.h"
#include "cuda/launcher.h"
#include "cuda/resources.h"
#include "cuda/slot.h"
#include "trace/recorder.h"

namespace dcp_fast::cuda {

struct DeviceStats {
  int64_t bytes_copied = 0;
  int64_t copies = 0;
  int64_t launches = 0;
  double copy_seconds = 0;  // that the copies of finished slots took on the device

  // Adds another device's, except for the time: the devices were at work at the same time.
  DeviceStats& join(const DeviceStats& other);
};

// Throws Error(kCuda), before anything is enqueued, if torch's streams record a CUDA graph rather than work.
void require_not_capturing(const std::map<int, StreamHandle>& torch_streams);

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
  // The NUMA node that host memory should be on; -1 if that does not matter or is not known.
  int numa_node() const { return numa_node_; }

  // Does work with the device's context; errors name the device.
  void in_context(const std::function<void()>& work) const;

  // From here on, what is submitted waits for the work that torch's stream has now.
  void begin(StreamHandle torch_stream, trace::Recorder* recorder);

  // Allocates staging memory, and loads the kernel or begins to compile it. Needed once, before a plan with entries.
  // Throws Error(kCuda, kCudaOutOfMemory, kCudaRefused); if compiling fails, what waits for a launch does.
  void prepare_to_launch();
  void wait_for_kernel() { launcher_.wait_for_all(); }

  // Enqueues the copies of a slot, and the launch that places its boxes. Thread-safe.
  void submit(size_t slot, const std::byte* memory, const SlotPlan& plan);

  // Whether the last work of a slot is done. Throws Error(kCuda) if it failed.
  bool is_done(size_t slot);

  // Waits until the last work of a slot is done. Throws Error(kCuda) if it failed.
  void wait(size_t slot);

  // Enqueues the dequantization of boxes, one after another, on torch's stream. Loads the kernel for it when it is
  // first needed, which may take some tenths of a second. Throws Error(kCuda, kCudaRefused).
  void dequantize(StreamHandle torch_stream, const std::vector<BoxDequantization>& boxes);

  // Torch's stream waits for all that was submitted.
  void end(StreamHandle torch_stream);

  // The host waits for what torch's stream has now. Throws Interrupted if `interrupted` says so.
  void synchronize(StreamHandle torch_stream, const std::function<bool()>& interrupted);

  // Waits for all that was submitted, even if some of it failed.
  void drain() noexcept;

  // Returns what was done in a load, at its end, and drops the recorder.
  DeviceStats take_stats();

 private:
  struct Slot {
    Event copy_begin;
    Event copied;
    Event kernel_begin;
    Event placed;
    uint32_t bytes = 0;         // how many are copied
    uint32_t staged_bytes = 0;  // how many of them the kernel places, descriptors included
    bool launched = false;
    bool timed = true;  // whether the stats have its times
  };

  void release() noexcept;
  void in_context_if_possible(const std::function<void()>& work) const noexcept;
  void copy(Slot& slot, DeviceAddress staging, const std::byte* memory, const SlotPlan& plan);
  void launch(FunctionHandle function, const Slot& slot, DeviceAddress staging, uint32_t entries, uint32_t count);
  void count_times(Slot& slot);

  const int ordinal_;
  const size_t slot_bytes_;
  PrimaryContext context_;
  int numa_node_ = -1;
  std::mutex copying_;  // the copies of a slot follow each other, so that its two events tell how long they took
  Stream copy_stream_;
  Stream kernel_stream_;
  std::vector<Slot> slots_;
  Event began_;         // with a recorder: on the copy stream, at its time `began_at_`
  Event torch_before_;  // on torch's stream
  Event torch_after_;   // on torch's stream
  Event copies_done_;
  Event kernels_done_;
  DeviceMemory staging_;  // for every slot; only once a box needs it
  std::mutex counting_;   // for what follows
  DeviceStats stats_;
  trace::Recorder* recorder_ = nullptr;
  int64_t began_at_ = 0;
  // Last: their threads use all of the above.
  Launcher launcher_;
  Launcher dequantizer_;
};

}  // namespace dcp_fast::cuda
