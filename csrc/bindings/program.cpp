// The transfer program for Python.

#include "transfer/program.h"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/column.h"
#include "bindings/file_options.h"
#include "bindings/python.h"
#include "bindings/streams.h"
#include "checkpoint/dtype.h"
#include "cuda/pinned_ring.h"
#include "transfer/engine.h"
#include "transfer/layouts.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using transfer::Destination;
using transfer::Item;
using transfer::Layouts;
using transfer::Program;
using transfer::Transfer;

std::unique_ptr<Program> make_program(const Layouts& layouts, const py::buffer& item_column,
                                      const py::buffer& destination_column) {
  std::vector<Destination> destinations;
  Column rows(destination_column);
  while (!rows.done()) {
    Destination destination;
    destination.data = reinterpret_cast<std::byte*>(rows.next());  // NOLINT(performance-no-int-to-ptr)
    const int64_t device = rows.next();
    if (device < transfer::kElsewhere || device > std::numeric_limits<int>::max())
      throw py::index_error("no such device");
    destination.device = static_cast<int>(device);
    const int64_t dtype = rows.next();
    if (dtype < checkpoint::kUnknownDType || dtype >= static_cast<int64_t>(checkpoint::kDTypes.size())) {
      throw py::index_error("no such dtype");
    }
    destination.dtype = static_cast<checkpoint::DType>(dtype);
    constexpr size_t kMostBytes = 16;  // of an element
    destination.itemsize = static_cast<int64_t>(rows.next_index(kMostBytes + 1));
    const size_t dims = rows.next_dims();
    destination.sizes = rows.next(dims);
    destination.strides = rows.next(dims);
    destinations.push_back(std::move(destination));
  }
  std::vector<Item> items;
  Column column(item_column);
  while (!column.done()) {
    Item item;
    item.record = column.next_index(layouts.records.size());
    item.destination = column.next_index(destinations.size());
    const size_t dims = column.next_dims();
    item.storage_offsets = column.next(dims);
    item.destination_offsets = column.next(dims);
    item.lengths = column.next(dims);
    items.push_back(std::move(item));
  }
  return std::make_unique<Program>(layouts, std::move(items), destinations);
}

std::vector<size_t> items_of_kind(const Program& program, Transfer::Kind kind, int32_t wave) {
  std::vector<size_t> indices;
  for (const size_t i : program.items_in_wave(wave)) {
    if (program.transfers()[i].kind == kind) indices.push_back(i);
  }
  return indices;
}

}  // namespace

void bind_program(py::module_& module) {
  py::class_<transfer::Stats>(module, "Stats")
      .def_readonly("requests", &transfer::Stats::requests)
      .def_readonly("bytes_read", &transfer::Stats::bytes_read)
      .def_readonly("bytes_placed", &transfer::Stats::bytes_placed)
      .def_readonly("bytes_mapped", &transfer::Stats::bytes_mapped)
      .def_property_readonly("why_unmapped",
                             [](const transfer::Stats& stats) { return io::why_unmapped(stats.unmapped); })
      .def_readonly("converted_items", &transfer::Stats::converted_items);

  py::class_<Program>(module, "Program")
      .def(py::init(&make_program), py::arg("layouts"), py::arg("items"), py::arg("destinations"),
           py::keep_alive<1, 2>())
      .def_property_readonly("waves", &Program::waves)
      .def_property_readonly("bytes_needed", py::overload_cast<>(&Program::bytes_needed, py::const_))
      .def("bytes_needed_of", py::overload_cast<int32_t>(&Program::bytes_needed, py::const_), py::arg("wave"))
      .def("cut", &Program::cut, py::arg("waves"))
      .def("box",
           [](const Program& program, size_t index) {
             const Item& item = program.items().at(index);
             return py::make_tuple(item.storage_offsets, item.lengths);
           })
      .def(
          "bytes_to_read",
          [](const Program& program, const FileOptions& options) {
            return without_gil([&] { return transfer::bytes_to_read(program, options); });
          },
          py::arg("options"))
      .def("converted", [](const Program& program,
                           int32_t wave) { return items_of_kind(program, Transfer::Kind::kConverted, wave); })
      .def("fallback",
           [](const Program& program, int32_t wave) { return items_of_kind(program, Transfer::Kind::kFallback, wave); })
      .def(
          "run",
          [](const Program& program, int32_t wave, const FileOptions& options, cuda::PinnedRing* ring,
             const StreamsByDevice& streams) {
            const transfer::CudaTargets targets{ring, stream_handles(streams)};
            return without_gil([&] { return transfer::run_wave(program, wave, options, targets, interrupted); });
          },
          py::arg("wave"), py::arg("options"), py::arg("ring") = nullptr, py::arg("streams") = StreamsByDevice());

  module.def(
      "run_programs",
      [](const std::vector<const Program*>& programs, const FileOptions& options, cuda::PinnedRing& ring,
         const StreamsByDevice& streams, const std::function<void(size_t)>& placed) {
        const transfer::CudaTargets targets{&ring, stream_handles(streams)};
        return without_gil([&] { return transfer::run_programs(programs, options, targets, interrupted, placed); });
      },
      py::arg("programs"), py::arg("options"), py::arg("ring"), py::arg("streams"), py::arg("placed"),
      "Runs programs of one wave each, one after another. When torch's current streams wait for all that a program has "
      "written, `placed` is called with its index. The program after the next one may use the same memory.");
}

}  // namespace dcp_fast
