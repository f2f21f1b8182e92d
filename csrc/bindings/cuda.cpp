// The pinned ring for Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <memory>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "bindings/streams.h"
#include "cuda/pinned_buffer.h"
#include "cuda/pinned_ring.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

void synchronize(cuda::PinnedRing& ring, const StreamsByDevice& streams) {
  without_gil([&] {
    ring.synchronize(stream_handles(streams), interrupted);
    return 0;
  });
}

// A ring waits for the GPUs before it goes. In a forked child nothing of the driver may be called, so a child's copy of
// what is pinned is left as it is.
template <typename Pinned>
struct Delete {
  pid_t owner = ::getpid();

  void operator()(Pinned* pinned) const {
    if (::getpid() != owner) return;
    const py::gil_scoped_release release;
    delete pinned;
  }
};

using OwnedRing = std::unique_ptr<cuda::PinnedRing, Delete<cuda::PinnedRing>>;
using OwnedBuffer = std::unique_ptr<cuda::PinnedBuffer, Delete<cuda::PinnedBuffer>>;

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

  py::class_<cuda::PinnedBuffer, OwnedBuffer>(module, "PinnedBuffer", py::buffer_protocol())
      .def(py::init([](size_t size, int device) {
             const py::gil_scoped_release release;
             return OwnedBuffer(new cuda::PinnedBuffer(size, device));
           }),
           py::arg("size"), py::arg("device"))
      .def_buffer([](const cuda::PinnedBuffer& buffer) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(buffer.data()), static_cast<py::ssize_t>(buffer.size()));
      });

  py::class_<cuda::PinnedRing, OwnedRing>(module, "PinnedRing")
      .def(py::init([](int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes) {
             return OwnedRing(new cuda::PinnedRing(pinned_bytes, device_bytes, block_bytes));
           }),
           py::kw_only(), py::arg("pinned_bytes"), py::arg("device_bytes"), py::arg("block_bytes"))
      .def_property_readonly("pinned_bytes", &cuda::PinnedRing::pinned_bytes)
      .def_property_readonly("device_bytes", &cuda::PinnedRing::device_bytes)
      .def("prepare", &cuda::PinnedRing::prepare, py::arg("device"), py::call_guard<py::gil_scoped_release>())
      .def("synchronize", &synchronize, py::arg("streams"))
      .def("drain", &cuda::PinnedRing::drain, py::call_guard<py::gil_scoped_release>())
      .def("take_stats", &cuda::PinnedRing::take_stats)
      .def("take_slot_seconds", &cuda::PinnedRing::take_slot_seconds);
}

}  // namespace dcp_fast
