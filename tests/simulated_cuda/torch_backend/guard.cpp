// The device guard: how torch's own C++ code, torch.Stream and torch.Event reach devices, streams and events.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "driver.h"
#include "streams.h"

namespace torch_backend {

namespace {

c10::Device device_of(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index}; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override { return device_of(exchange_device(device.index())); }
  c10::Device getDevice() const override { return device_of(current_device()); }
  void setDevice(c10::Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange_device(device.index()); }
  c10::DeviceIndex deviceCount() const noexcept override {
    try {
      return device_count();
    } catch (const c10::Error&) {
      return 0;  // what the interface asks for where there is no driver
    }
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override { synchronize_device(device); }

  c10::Stream getStream(c10::Device device) const override { return current_stream(device.index()); }
  c10::Stream getDefaultStream(c10::Device device) const override { return default_stream(device.index()); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*isHighPriority*/) const override {
    return pool_stream(device.index());
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/) const override { return pool_stream(device.index()); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return exchange_stream(stream); }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return handle(stream.id()); }
  bool queryStream(const c10::Stream& stream) const override {
    const DeviceScope scope(stream.device_index());
    return is_ready(driver().query_stream(handle(stream.id())), "cuStreamQuery");
  }
  void synchronizeStream(const c10::Stream& stream) const override { synchronize_stream(stream); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex /*device*/,
              const c10::EventFlag flag) const override {
    const DeviceScope scope(stream.device_index());
    if (*event == nullptr) {
      const unsigned flags = flag == c10::EventFlag::BACKEND_DEFAULT ? 0 : kDisableTiming;
      check(driver().create_event(event, flags), "cuEventCreate");
    }
    check(driver().record_event(*event, handle(stream.id())), "cuEventRecord");
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) {
      const DeviceScope scope(stream.device_index());
      check(driver().wait_for_event(handle(stream.id()), event, 0), "cuStreamWaitEvent");
    }
  }
  bool queryEvent(void* event) const override {
    const DeviceScope scope(current_device());
    return event == nullptr || is_ready(driver().query_event(event), "cuEventQuery");
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      const DeviceScope scope(current_device());
      check(driver().synchronize_event(event), "cuEventSynchronize");
    }
  }
  void destroyEvent(void* event, const c10::DeviceIndex device) const noexcept override {
    if (event != nullptr && !in_bad_fork()) {
      const DeviceScope scope(device);
      driver().destroy_event(event);
    }
  }

 private:
  static bool is_ready(int status, const char* function) {
    if (status != kNotReady) {
      check(status, function);
    }
    return status == kSuccess;
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

}  // namespace torch_backend
