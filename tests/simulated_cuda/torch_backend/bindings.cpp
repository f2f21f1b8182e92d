// The functions that torch/cuda/*.py expects in torch._C of a CUDA build; install.py puts them there.
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "collectives.h"
#include "driver.h"
#include "hooks.h"
#include "memory.h"
#include "streams.h"

namespace torch_backend {

namespace {

using StreamData = std::tuple<int64_t, int64_t, int64_t>;

StreamData data_of(c10::Stream stream) {
  const c10::StreamData3 data = stream.pack3();
  return {data.stream_id, data.device_index, static_cast<int64_t>(data.device_type)};
}

void set_stream(int64_t stream_id, int64_t device_index, int64_t device_type) {
  const c10::Stream stream = c10::Stream::unpack3(stream_id, static_cast<c10::DeviceIndex>(device_index),
                                                  static_cast<c10::DeviceType>(device_type));
  exchange_device(stream.device_index());
  exchange_stream(stream);
}

void synchronize() {
  synchronize_device(current_device());
  reap();
}

pybind11::dict memory_stats(c10::DeviceIndex device) {
  const MemoryUse use = memory_use(device);
  pybind11::dict all;
  all["current"] = use.current;
  all["peak"] = use.peak;
  pybind11::dict kinds;
  kinds["all"] = all;
  // No device memory is cached: what is reserved is allocated.
  return pybind11::dict(pybind11::arg("allocated_bytes") = kinds, pybind11::arg("reserved_bytes") = kinds);
}

double elapsed_time(int64_t begin, int64_t end) {
  const DeviceScope scope(current_device());
  float milliseconds = 0;
  check(driver().elapsed_time(&milliseconds, reinterpret_cast<Handle>(begin), reinterpret_cast<Handle>(end)),
        "cuEventElapsedTime");
  return static_cast<double>(milliseconds);
}

int device_attribute(int attribute, c10::DeviceIndex device) {
  int value = 0;
  check(driver().device_attribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> released;
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator());
  install_hooks();
  install_collectives();

  m.def("_cuda_isInBadFork", &in_bad_fork);
  m.def("_cuda_getDeviceCount", &device_count);
  m.def("_cuda_getDevice", &current_device);
  m.def("_cuda_setDevice", [](c10::DeviceIndex device) { exchange_device(device); });
  // torch passes a negative index for "leave it as it is".
  m.def("_cuda_exchangeDevice",
        [](int device) { return device < 0 ? int{-1} : int{exchange_device(static_cast<c10::DeviceIndex>(device))}; });
  m.def("_cuda_synchronize", &synchronize, released);
  m.def("_cuda_getCurrentStream", [](c10::DeviceIndex device) { return data_of(current_stream(device)); });
  m.def("_cuda_getDefaultStream", [](c10::DeviceIndex device) { return data_of(default_stream(device)); });
  m.def("_cuda_getPoolStream", [] { return data_of(pool_stream(current_device())); });
  m.def("_cuda_getCurrentRawStream", [](c10::DeviceIndex device) { return current_stream(device).id(); });
  m.def("_cuda_setStream", &set_stream, pybind11::arg("stream_id"), pybind11::arg("device_index"),
        pybind11::arg("device_type"));
  m.def("_cuda_memoryStats", &memory_stats);
  m.def("_cuda_resetPeakMemoryStats", &reset_peak);
  m.def("_cuda_emptyCache", &reap, released);
  // The tensor stands for its storage, which pybind11 does not know.
  m.def("resize_storage", [](const at::Tensor& tensor, size_t bytes) { resize_storage(tensor.storage(), bytes); });
  m.def("elapsed_time", &elapsed_time);
  m.def("device_attribute", &device_attribute);
  m.def("has_context", &has_context);
  // The driver's objects that torch keeps until the process ends.
  m.def("kept_objects", [] {
    size_t contexts = 0;
    for (c10::DeviceIndex device = 0; device < device_count(); ++device) {
      contexts += has_context(device) ? 1 : 0;
    }
    return contexts + pool_size() + kept_allocations();
  });
}

}  // namespace torch_backend
