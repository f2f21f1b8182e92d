#include "cuda/device.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>
#include <utility>

#include "cuda/dequantize_launch.h"
#include "cuda/numa.h"
#include "error.h"

namespace dcp_fast::cuda {

namespace {

constexpr unsigned kThreadsPerBlock = 256;  // as the kernel is compiled for

std::string name_of(int ordinal) { return "cuda:" + std::to_string(ordinal); }

double milliseconds_between(const Event& from, const Event& to) {
  float result = 0;
  DCP_FAST_CUDA(cuEventElapsedTime, &result, from.get(), to.get());
  return result;
}

// Does work of a device. Errors name the device.
template <typename Work>
decltype(auto) naming(int ordinal, const Work& work) {
  try {
    return work();
  } catch (const Error& error) {
    throw Error::of_device(ordinal, error.kind, name_of(ordinal) + ": " + error.what());
  }
}

}  // namespace

void Device::in_context(const std::function<void()>& work) const {
  naming(ordinal_, [&] {
    const CurrentContext current(context_);
    work();
  });
}

// If the context is broken, there is no work left to wait for, and nothing can be freed before the process ends.
void Device::in_context_if_possible(const std::function<void()>& work) const noexcept {
  try {
    in_context(work);
  } catch (...) {  // NOLINT(bugprone-empty-catch)
  }
}

DeviceStats& DeviceStats::join(const DeviceStats& other) {
  bytes_copied += other.bytes_copied;
  copies += other.copies;
  launches += other.launches;
  copy_seconds = std::max(copy_seconds, other.copy_seconds);
  return *this;
}

void require_not_capturing(const std::map<int, StreamHandle>& torch_streams) {
  for (const auto& [ordinal, stream] : torch_streams) {
    const int device = ordinal;
    StreamHandle const torch_stream = stream;
    naming(device, [=] {
      const PrimaryContext context(device);
      const CurrentContext current(context);
      int status = kCaptureNone;
      DCP_FAST_CUDA(cuStreamIsCapturing, torch_stream, &status);
      if (status == kCaptureNone) return;
      throw Error(ErrorKind::kCuda,
                  "torch's current stream is being captured into a CUDA graph, which cannot hold a load: load before "
                  "the capture begins or after it has ended");
    });
  }
}

Device::Device(int ordinal, size_t slots, size_t slot_bytes)
    : ordinal_(ordinal),
      slot_bytes_(slot_bytes),
      context_(naming(ordinal, [=] { return PrimaryContext(ordinal); })),
      launcher_(kBoxCopyImages, context_.device(), [this](const auto& work) { in_context(work); }),
      dequantizer_(kDequantizeImages, context_.device(), [this](const auto& work) { in_context(work); }) {
  try {
    in_context([&] {
      std::array<char, 32> bus_id{};
      if (driver().cuDeviceGetPCIBusId(bus_id.data(), bus_id.size(), context_.device()) == kSuccess) {
        numa_node_ = numa_node_of(bus_id.data());
      }
      copy_stream_ = make_stream();
      kernel_stream_ = make_stream();
      for (Event* event : {&began_, &torch_before_, &torch_after_, &copies_done_, &kernels_done_})
        *event = make_event();
      slots_.resize(slots);
      for (Slot& slot : slots_) {
        for (Event* event : {&slot.copy_begin, &slot.copied, &slot.kernel_begin, &slot.placed}) *event = make_event();
      }
    });
  } catch (...) {
    release();
    throw;
  }
}

Device::~Device() {
  drain();
  release();
}

void Device::release() noexcept {
  in_context_if_possible([&] {
    launcher_.release();
    dequantizer_.release();
    slots_.clear();
    for (Event* event : {&began_, &torch_before_, &torch_after_, &copies_done_, &kernels_done_}) event->reset();
    staging_.reset();
    kernel_stream_.reset();
    copy_stream_.reset();
  });
}

void Device::begin(StreamHandle torch_stream, trace::Recorder* recorder) {
  const std::scoped_lock lock(copying_, counting_);
  in_context([&] {
    const bool first = recorder != recorder_;  // of several waves of a load
    recorder_ = recorder;
    if (first && recorder_ != nullptr) {
      // On an idle stream an event happens when it is recorded. This ties the device's time to the recorder's.
      DCP_FAST_CUDA(cuStreamSynchronize, copy_stream_.get());
      began_at_ = recorder_->now();
      DCP_FAST_CUDA(cuEventRecord, began_.get(), copy_stream_.get());
      DCP_FAST_CUDA(cuEventSynchronize, began_.get());
    }
    // Torch may have handed out memory that work under way on its stream still uses. The kernel stream need not wait
    // for it, since each kernel waits for copies.
    DCP_FAST_CUDA(cuEventRecord, torch_before_.get(), torch_stream);
    DCP_FAST_CUDA(cuStreamWaitEvent, copy_stream_.get(), torch_before_.get(), 0);
  });
}

void Device::prepare_to_launch() {
  in_context([&] {
    if (!staging_) staging_ = allocate(slots_.size() * slot_bytes_);
  });
  launcher_.prepare();
}

void Device::submit(size_t index, const std::byte* memory, const SlotPlan& plan) {
  Slot& slot = slots_[index];
  slot.launched = !plan.entries.empty();
  // From a device, descriptors are all that comes from the host.
  slot.bytes = plan.is_from_device() ? plan.staged_bytes - plan.descriptors : plan.staged_bytes;
  for (const StraightCopy& copy : plan.straight) slot.bytes += copy.bytes;
  slot.staged_bytes = plan.staged_bytes;
  slot.timed = false;
  const DeviceAddress staging = staging_.get() + index * slot_bytes_;
  in_context([&] { copy(slot, staging, memory, plan); });
  {
    const std::scoped_lock lock(counting_);
    stats_.bytes_copied += slot.bytes;
    stats_.copies += static_cast<int64_t>(plan.straight.size()) + (slot.launched ? 1 : 0);
    stats_.launches += slot.launched ? 1 : 0;
  }
  if (!slot.launched) return;
  const uint32_t entries = plan.entries_offset();
  const auto count = static_cast<uint32_t>(plan.entries.size());
  launcher_.submit(index, [this, &slot, staging, entries, count](FunctionHandle function) {
    launch(function, slot, staging, entries, count);
  });
}

void Device::copy(Slot& slot, DeviceAddress staging, const std::byte* memory, const SlotPlan& plan) {
  const std::scoped_lock lock(copying_);
  DCP_FAST_CUDA(cuEventRecord, slot.copy_begin.get(), copy_stream_.get());
  for (const StraightCopy& copy : plan.straight) {
    DCP_FAST_CUDA(cuMemcpyHtoDAsync_v2, copy.destination, memory + copy.offset, copy.bytes, copy_stream_.get());
  }
  for (const DeviceCopy& copy : plan.to_place) {
    DCP_FAST_CUDA(cuMemcpyDtoDAsync_v2, copy.destination, copy.source, copy.bytes, copy_stream_.get());
  }
  for (const DeviceCopy& copy : plan.to_staging) {
    DCP_FAST_CUDA(cuMemcpyDtoDAsync_v2, staging + copy.destination, copy.source, copy.bytes, copy_stream_.get());
  }
  if (slot.launched) {
    const uint32_t begin = plan.is_from_device() ? plan.descriptors : 0;
    DCP_FAST_CUDA(cuMemcpyHtoDAsync_v2, staging + begin, memory + begin, plan.staged_bytes - begin, copy_stream_.get());
  }
  DCP_FAST_CUDA(cuEventRecord, slot.copied.get(), copy_stream_.get());
}

void Device::launch(FunctionHandle function, const Slot& slot, DeviceAddress staging, uint32_t entries,
                    uint32_t count) {
  uint64_t base = staging;
  void* arguments[] = {&base, &entries, &count};
  DCP_FAST_CUDA(cuStreamWaitEvent, kernel_stream_.get(), slot.copied.get(), 0);
  DCP_FAST_CUDA(cuEventRecord, slot.kernel_begin.get(), kernel_stream_.get());
  require("cuLaunchKernel", driver().cuLaunchKernel(function, count, 1, 1, kThreadsPerBlock, 1, 1, 0,
                                                    kernel_stream_.get(), arguments, nullptr));
  DCP_FAST_CUDA(cuEventRecord, slot.placed.get(), kernel_stream_.get());
}

void Device::dequantize(StreamHandle torch_stream, const std::vector<BoxDequantization>& boxes) {
  dequantizer_.prepare();
  dequantizer_.wait_for_all();
  dequantizer_.submit(0, [&](FunctionHandle function) {
    for (BoxDequantization box : boxes) {
      void* arguments[] = {&box};
      require("cuLaunchKernel", driver().cuLaunchKernel(function, thread_blocks(box), 1, 1, kDequantizeThreads, 1, 1, 0,
                                                        torch_stream, arguments, nullptr));
    }
  });
  const std::scoped_lock lock(counting_);
  stats_.launches += static_cast<int64_t>(boxes.size());
}

bool Device::is_done(size_t index) {
  const Slot& slot = slots_[index];
  if (slot.launched && !launcher_.is_settled(index)) return false;
  bool done = false;
  in_context([&] {
    const Result result = driver().cuEventQuery((slot.launched ? slot.placed : slot.copied).get());
    done = result != kErrorNotReady;
    if (done) check("cuEventQuery", result);
  });
  return done;
}

void Device::wait(size_t index) {
  Slot& slot = slots_[index];
  if (slot.launched) launcher_.wait(index);
  in_context([&] { DCP_FAST_CUDA(cuEventSynchronize, (slot.launched ? slot.placed : slot.copied).get()); });
  const std::scoped_lock lock(counting_);
  if (!slot.timed) in_context([&] { count_times(slot); });
}

void Device::count_times(Slot& slot) {
  slot.timed = true;
  stats_.copy_seconds += milliseconds_between(slot.copy_begin, slot.copied) / 1e3;
  if (recorder_ == nullptr) return;
  const auto add = [this](const char* what, const Event& from, const Event& to, int64_t bytes) {
    const auto at = [this](const Event& event) {
      return began_at_ + static_cast<int64_t>(milliseconds_between(began_, event) * 1e6);
    };
    recorder_->add(recorder_->track(name_of(ordinal_) + " " + what), what, at(from), at(to), {bytes});
  };
  add("copy", slot.copy_begin, slot.copied, slot.bytes);
  if (slot.launched) add("kernel", slot.kernel_begin, slot.placed, slot.staged_bytes);
}

void Device::end(StreamHandle torch_stream) {
  launcher_.wait_for_all();
  const std::scoped_lock lock(copying_);
  in_context([&] {
    DCP_FAST_CUDA(cuEventRecord, copies_done_.get(), copy_stream_.get());
    DCP_FAST_CUDA(cuEventRecord, kernels_done_.get(), kernel_stream_.get());
    DCP_FAST_CUDA(cuStreamWaitEvent, torch_stream, copies_done_.get(), 0);
    DCP_FAST_CUDA(cuStreamWaitEvent, torch_stream, kernels_done_.get(), 0);
  });
}

void Device::synchronize(StreamHandle torch_stream, const std::function<bool()>& interrupted) {
  constexpr auto kPoll = std::chrono::microseconds(200);  // asleep: the driver itself might spin
  constexpr auto kAsk = std::chrono::milliseconds(100);
  in_context([&] { DCP_FAST_CUDA(cuEventRecord, torch_after_.get(), torch_stream); });
  auto asked = std::chrono::steady_clock::now();
  for (bool ready = false; !ready;) {
    in_context([&] {
      const Result result = driver().cuEventQuery(torch_after_.get());
      ready = result != kErrorNotReady;
      if (ready) check("cuEventQuery", result);
    });
    if (ready) return;
    std::this_thread::sleep_for(kPoll);
    const auto now = std::chrono::steady_clock::now();
    if (now - asked < kAsk) continue;
    asked = now;
    if (interrupted()) throw Interrupted();
  }
}

void Device::drain() noexcept {
  launcher_.join();
  dequantizer_.join();
  in_context_if_possible([&] {
    // If one of the streams fails, the other one must be waited for all the same. Events are used because a thread that
    // waits for a stream may spin.
    const auto wait = [](const Stream& stream, const Event& done) {
      if (!stream) return;
      const bool waited = done && driver().cuEventRecord(done.get(), stream.get()) == kSuccess &&
                          driver().cuEventSynchronize(done.get()) == kSuccess;
      if (!waited) static_cast<void>(driver().cuStreamSynchronize(stream.get()));
    };
    wait(copy_stream_, copies_done_);
    wait(kernel_stream_, kernels_done_);
  });
}

DeviceStats Device::take_stats() {
  const std::scoped_lock lock(counting_);
  recorder_ = nullptr;
  // Copies that are still under way belong to this load. The next one will wait for them, but must not count their
  // time.
  for (Slot& slot : slots_) slot.timed = true;
  return std::exchange(stats_, {});
}

}  // namespace dcp_fast::cuda
