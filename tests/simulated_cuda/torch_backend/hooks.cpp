#include "hooks.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <new>

#include "driver.h"
#include "memory.h"
#include "streams.h"

namespace torch_backend {

namespace {

constexpr int kDeviceOrdinal = 9;  // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex device) const override { return has_context(device); }
  int getNumGPUs() const override { return device_count(); }

  c10::DeviceIndex deviceCount() const override { return device_count(); }
  c10::DeviceIndex current_device() const override { return torch_backend::current_device(); }
  c10::DeviceIndex getCurrentDevice() const override { return torch_backend::current_device(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchange_device(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  void deviceSynchronize(c10::DeviceIndex device) const override { synchronize_device(device); }

  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator(); }
  at::Device getDeviceFromPtr(void* data) const override {
    int ordinal = 0;
    check(driver().pointer_attribute(&ordinal, kDeviceOrdinal, reinterpret_cast<DeviceAddress>(data)),
          "cuPointerGetAttribute");
    return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(ordinal)};
  }

  // Random numbers come from the fallback, thus from the CPU's generator.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex /*device*/) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex /*device*/) const override { return at::detail::createCPUGenerator(); }
};

}  // namespace

void install_hooks() {
  // A CPU build has made its hooks for "no CUDA" before any extension can be loaded, keeps them in a private static and
  // hands out references. So ours have to take their very place, which they can as neither has members.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
}

}  // namespace torch_backend
