#include "driver.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>

namespace torch_backend {

namespace {

std::atomic<pid_t> owner{0};  // the process that initialised the driver
std::mutex contexts_mutex;
std::array<Handle, kMaxDevices> contexts{};

template <typename Function>
void find(void* library, const char* symbol, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, symbol));
}

Driver load() {
  const char* path = std::getenv("DCP_FAST_LIBCUDA");
  TORCH_CHECK(path != nullptr, "DCP_FAST_LIBCUDA names no library");
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, dlerror());
  Driver found;
#define TORCH_BACKEND_FIND(member, symbol, ...) \
  find(library, symbol, found.member);          \
  TORCH_CHECK(found.member != nullptr, path, " has no ", symbol);
  TORCH_BACKEND_DRIVER_FUNCTIONS(TORCH_BACKEND_FIND)
#undef TORCH_BACKEND_FIND
  find(library, "simcuda_host_write", found.host_write);
  find(library, "simcuda_host_read", found.host_read);
  const int status = found.init(0);
  TORCH_CHECK(status == kSuccess, "cuInit failed with error ", status);
  owner = getpid();
  return found;
}

Handle context_of(c10::DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal ", int{device});
  const std::lock_guard lock(contexts_mutex);
  Handle& context = contexts.at(static_cast<size_t>(device));
  if (context == nullptr) {
    check(driver().retain_context(&context, device), "cuDevicePrimaryCtxRetain");
  }
  return context;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

bool in_bad_fork() { return owner != 0 && owner != getpid(); }

void check(int status, const char* function) {
  if (status == kSuccess) {
    return;
  }
  const char* name = nullptr;
  driver().error_name(status, &name);
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, status,
                              c10::str("CUDA error: ", name == nullptr ? "unknown" : name, " in ", function));
}

c10::DeviceIndex device_count() {
  static const int count = [] {
    int found = 0;
    check(driver().device_count(&found), "cuDeviceGetCount");
    TORCH_CHECK(static_cast<size_t>(found) <= kMaxDevices, "more devices than ", kMaxDevices);
    return found;
  }();
  return static_cast<c10::DeviceIndex>(count);
}

bool has_context(c10::DeviceIndex device) {
  const std::lock_guard lock(contexts_mutex);
  return contexts.at(static_cast<size_t>(device)) != nullptr;
}

DeviceScope::DeviceScope(c10::DeviceIndex device) {
  Handle context = context_of(device);
  check(driver().get_context(&before_), "cuCtxGetCurrent");
  check(driver().set_context(context), "cuCtxSetCurrent");
}

DeviceScope::~DeviceScope() { driver().set_context(before_); }

}  // namespace torch_backend
