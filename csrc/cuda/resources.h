// Owners of what the driver hands out. A handle is given back when its owner goes.
#pragma once

#include <cstddef>
#include <utility>

#include "cuda/driver.h"

namespace dcp_fast::cuda {

// A handle, and the driver's function that gives it back. This needs the context of the handle to be current.
template <typename Handle, Result (*Driver::*kGiveBack)(Handle)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  ~Owned() { reset(); }
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != Handle{}; }
  // After a failed launch every call fails, and this one too. The driver then frees all at the end of the process.
  void reset() noexcept {
    if (handle_ != Handle{}) static_cast<void>((driver().*kGiveBack)(std::exchange(handle_, Handle{})));
  }

 private:
  Handle handle_{};
};

using Stream = Owned<StreamHandle, &Driver::cuStreamDestroy_v2>;
using Event = Owned<EventHandle, &Driver::cuEventDestroy_v2>;
using Module = Owned<ModuleHandle, &Driver::cuModuleUnload>;
using DeviceMemory = Owned<DeviceAddress, &Driver::cuMemFree_v2>;

// A stream that does not wait for the default stream, nor that one for it.
Stream make_stream();
// An event that knows its time. A thread that waits for it sleeps.
Event make_event();
DeviceMemory allocate(size_t size);

// The primary context of a device, which torch uses too.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  ContextHandle get() const { return handle_; }
  Ordinal device() const { return device_; }

 private:
  Ordinal device_ = 0;
  ContextHandle handle_ = nullptr;
};

// Makes a context the current one of this thread, and puts back the former one at the end, which torch counts on.
// Meanwhile calls of this thread do no harm to CUDA graphs that other threads capture, and captures none to the calls.
class CurrentContext {
 public:
  explicit CurrentContext(const PrimaryContext& context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  ContextHandle before_ = nullptr;
  int capture_mode_ = kCaptureRelaxed;
};

}  // namespace dcp_fast::cuda
