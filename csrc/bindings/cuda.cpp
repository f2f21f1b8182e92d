// The staging memory of GPUs for Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <memory>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "bindings/streams.h"
#include "cuda/staging.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

void synchronize(cuda::Staging& staging, const StreamsByDevice& streams) {
  without_gil([&] {
    staging.synchronize(stream_handles(streams), interrupted);
    return 0;
  });
}

// What holds GPU memory waits for the GPU before it goes. In a child of the process that made it nothing of the driver
// may be called: the child's copy is left as it is.
struct DeleteStaging {
  pid_t owner = ::getpid();

  void operator()(cuda::Staging* staging) const {
    if (::getpid() != owner) return;
    const py::gil_scoped_release release;
    delete staging;
  }
};

}  // namespace

void bind_cuda(py::module_& module) {
  module.def(
      "require_not_capturing",
      [](const StreamsByDevice& streams) { cuda::require_not_capturing(stream_handles(streams)); }, py::arg("streams"),
      py::call_guard<py::gil_scoped_release>());

  py::class_<cuda::DeviceStats>(module, "DeviceStats")
      .def_readonly("bytes_copied", &cuda::DeviceStats::bytes_copied)
      .def_readonly("copies", &cuda::DeviceStats::copies)
      .def_readonly("launches", &cuda::DeviceStats::launches)
      .def_readonly("copy_seconds", &cuda::DeviceStats::copy_seconds);

  py::class_<cuda::Staging, std::unique_ptr<cuda::Staging, DeleteStaging>>(module, "CudaStaging")
      .def(py::init([](int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes) {
             return std::unique_ptr<cuda::Staging, DeleteStaging>(
                 new cuda::Staging(pinned_bytes, device_bytes, block_bytes));
           }),
           py::kw_only(), py::arg("pinned_bytes"), py::arg("device_bytes"), py::arg("block_bytes"))
      .def_property_readonly("pinned_bytes", &cuda::Staging::pinned_bytes)
      .def_property_readonly("device_bytes", &cuda::Staging::device_bytes)
      .def("prepare", &cuda::Staging::prepare, py::arg("device"), py::call_guard<py::gil_scoped_release>())
      .def("synchronize", &synchronize, py::arg("streams"))
      .def("drain", &cuda::Staging::drain, py::call_guard<py::gil_scoped_release>())
      .def("take_stats", &cuda::Staging::take_stats)
      .def("take_slot_seconds", &cuda::Staging::take_slot_seconds);
}

}  // namespace dcp_fast
