#include "cuda/driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <type_traits>

#include "error.h"

namespace dcp_fast::cuda {

namespace {

constexpr const char* kDefaultLibrary = "libcuda.so.1";

std::string last_dl_error() {
  const char* text = ::dlerror();  // NOLINT(concurrency-mt-unsafe): glibc keeps it per thread
  return text != nullptr ? text : "unknown reason";
}

const char* library_name() {
  const char* name = std::getenv("DCP_FAST_LIBCUDA");  // NOLINT(concurrency-mt-unsafe): nobody sets it here
  return name != nullptr && *name != '\0' ? name : kDefaultLibrary;
}

// The library is never closed, because threads of the driver run its code until the process ends.
Driver load() {
  const char* name = library_name();
  // NOLINTNEXTLINE(clang-analyzer-optin.taint.GenericTaint): who sets the environment chooses the driver
  void* library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Error(ErrorKind::kCuda, "the CUDA driver cannot be loaded: dlopen: " + last_dl_error());
  Driver driver;
  const auto find = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, symbol));
    if (function == nullptr) {
      throw Error(ErrorKind::kCuda,
                  "the CUDA driver " + std::string(name) + " lacks a call: dlsym: " + last_dl_error());
    }
  };
#define DCP_FAST_FIND(name, parameters) find(driver.name, #name);
  DCP_FAST_DRIVER_CALLS(DCP_FAST_FIND)
#undef DCP_FAST_FIND
  driver.simcuda_host_write =
      reinterpret_cast<decltype(driver.simcuda_host_write)>(::dlsym(library, "simcuda_host_write"));
  return driver;
}

std::string describe(const Driver& driver, const char* function, Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.cuGetErrorName(result, &name);
  driver.cuGetErrorString(result, &text);
  std::string message = std::string(function) + " failed: ";
  message += name != nullptr ? name : "CUresult " + std::to_string(result);
  if (text != nullptr) message += std::string(" (") + text + ")";
  return message;
}

void check(const Driver& driver, const char* function, Result result) {
  if (result == kSuccess) return;
  const ErrorKind kind = result == kErrorOutOfMemory ? ErrorKind::kCudaOutOfMemory : ErrorKind::kCuda;
  throw Error(kind, describe(driver, function, result));
}

}  // namespace

const Driver& driver() {
  // Where this fails, the next call tries again.
  static const Driver found = [] {
    Driver loaded = load();
    check(loaded, "cuInit", loaded.cuInit(0));
    return loaded;
  }();
  return found;
}

void check(const char* function, Result result) { check(driver(), function, result); }

bool is_refusal(Result result) {
#define DCP_FAST_NUMBER(name, number) number,
  static constexpr Result kBreaking[] = {DCP_FAST_BREAKING_RESULTS(DCP_FAST_NUMBER)};
#undef DCP_FAST_NUMBER
  return result != kSuccess && std::find(std::begin(kBreaking), std::end(kBreaking), result) == std::end(kBreaking);
}

void require(const char* function, Result result) {
  if (is_refusal(result)) throw Error(ErrorKind::kCudaRefused, describe(driver(), function, result));
  check(function, result);
}

}  // namespace dcp_fast::cuda
