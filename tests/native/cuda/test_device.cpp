#include "test_device.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <stdexcept>

#include "error.h"

namespace dcp_fast::testing {

namespace {

using cuda::CurrentContext;
using cuda::DeviceAddress;
using cuda::Result;

const char* library() {
  const char* name = std::getenv("DCP_FAST_LIBCUDA");  // NOLINT(concurrency-mt-unsafe)
  return name != nullptr ? name : "libcuda.so.1";
}

// A symbol of the driver that the engine loads too: the same handle, by name.
template <typename Function>
Function symbol(const char* name) {
  void* handle = ::dlopen(library(), RTLD_NOW | RTLD_LOCAL);
  return handle == nullptr ? nullptr : reinterpret_cast<Function>(::dlsym(handle, name));
}

void require(Result result) {
  if (result != cuda::kSuccess) throw std::runtime_error("the test's own CUDA call failed: " + std::to_string(result));
}

}  // namespace

const Simulator* simulator() {
  static const Simulator found = [] {
    Simulator result;
    result.set = symbol<decltype(result.set)>("simcuda_set");
    result.fault = symbol<decltype(result.fault)>("simcuda_fault");
    result.calls = symbol<decltype(result.calls)>("simcuda_calls");
    result.reports = symbol<decltype(result.reports)>("simcuda_reports");
    result.leaks = symbol<decltype(result.leaks)>("simcuda_leaks");
    result.statistic = symbol<decltype(result.statistic)>("simcuda_statistic");
    result.busy_seconds = symbol<decltype(result.busy_seconds)>("simcuda_busy_seconds");
    result.reset = symbol<decltype(result.reset)>("simcuda_reset");
    return result;
  }();
  return found.set != nullptr ? &found : nullptr;
}

std::string take_reports() {
  if (simulator() == nullptr) return "";
  std::array<char, 4096> buffer{};
  return simulator()->reports("", buffer.data(), buffer.size(), 1) > 0 ? buffer.data() : "";
}

std::string leaks() {
  if (simulator() == nullptr) return "";
  std::array<char, 1024> buffer{};
  return simulator()->leaks(buffer.data(), buffer.size()) > 0 ? buffer.data() : "";
}

bool has_device(int ordinal) {
  // Not by asking for it: compute-sanitizer reports every call that fails.
  static const auto count_devices = symbol<Result (*)(int*)>("cuDeviceGetCount");
  try {
    cuda::driver();
    int count = 0;
    return count_devices(&count) == cuda::kSuccess && ordinal < count;
  } catch (const Error&) {
    return false;
  }
}

DeviceBytes::DeviceBytes(int ordinal, const std::string& contents) : context_(ordinal), size_(contents.size()) {
  const CurrentContext current(context_);
  memory_ = cuda::allocate(size_ + 1);
  upload(contents);
}

DeviceBytes::~DeviceBytes() {
  const CurrentContext current(context_);
  memory_.reset();
}

void DeviceBytes::upload(const std::string& contents) {
  const CurrentContext current(context_);
  static const auto copy = symbol<Result (*)(DeviceAddress, const void*, size_t)>("cuMemcpyHtoD_v2");
  if (size_ > 0) require(copy(memory_.get(), contents.data(), size_));
  // From memory that is not pinned the last bytes may still be on their way.
  require(cuda::driver().cuStreamSynchronize(nullptr));
}

std::string DeviceBytes::download() const {
  const CurrentContext current(context_);
  static const auto copy = symbol<Result (*)(void*, DeviceAddress, size_t)>("cuMemcpyDtoH_v2");
  std::string contents(size_, '\0');
  if (size_ > 0) require(copy(contents.data(), memory_.get(), size_));
  return contents;
}

TorchStream::TorchStream(int ordinal) : context_(ordinal) {
  const CurrentContext current(context_);
  stream_ = cuda::make_stream();
}

TorchStream::~TorchStream() {
  const CurrentContext current(context_);
  stream_.reset();
}

void TorchStream::fill(const DeviceBytes& memory, size_t bytes, char value) const {
  const CurrentContext current(context_);
  static const auto fill =
      symbol<Result (*)(DeviceAddress, unsigned char, size_t, cuda::StreamHandle)>("cuMemsetD8Async");
  require(fill(reinterpret_cast<DeviceAddress>(memory.address()), static_cast<unsigned char>(value), bytes, get()));
}

void TorchStream::copy(const DeviceBytes& to, const DeviceBytes& from, size_t bytes) const {
  const CurrentContext current(context_);
  static const auto copy =
      symbol<Result (*)(DeviceAddress, DeviceAddress, size_t, cuda::StreamHandle)>("cuMemcpyDtoDAsync_v2");
  require(copy(reinterpret_cast<DeviceAddress>(to.address()), reinterpret_cast<DeviceAddress>(from.address()), bytes,
               get()));
}

void TorchStream::download(void* pinned, const DeviceBytes& memory, size_t bytes) const {
  const CurrentContext current(context_);
  static const auto copy = symbol<Result (*)(void*, DeviceAddress, size_t, cuda::StreamHandle)>("cuMemcpyDtoHAsync_v2");
  require(copy(pinned, reinterpret_cast<DeviceAddress>(memory.address()), bytes, get()));
}

void TorchStream::synchronize() const {
  const CurrentContext current(context_);
  require(cuda::driver().cuStreamSynchronize(get()));
}

}  // namespace dcp_fast::testing
