// Columns of metadata on their way from one rank to others, for Python, which owns the connection.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "error.h"
#include "metadata/columns_stream.h"
#include "metadata/failure.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using metadata::Columns;
using metadata::ColumnsDecoder;
using metadata::ColumnsEncoder;

// None where the columns are none that can be sent.
std::unique_ptr<ColumnsEncoder> encode_columns(const std::shared_ptr<Columns>& columns, uint64_t file_bytes) {
  std::unique_ptr<ColumnsEncoder> encoder;
  try {
    const py::gil_scoped_release release;
    with_memory_errors([&] { encoder = std::make_unique<ColumnsEncoder>(columns, file_bytes); });
  } catch (const metadata::Unsupported&) {
    return nullptr;
  }
  return encoder;
}

size_t read(ColumnsEncoder& encoder, const py::buffer& buffer) {
  const py::buffer_info info = buffer.request(/*writable=*/true);
  const py::gil_scoped_release release;
  return encoder.read(static_cast<std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
}

std::unique_ptr<ColumnsDecoder> make_decoder(std::vector<uint64_t> sizes, uint64_t file_bytes) {
  std::unique_ptr<ColumnsDecoder> decoder;
  with_memory_errors([&] { decoder = std::make_unique<ColumnsDecoder>(std::move(sizes), file_bytes); });
  return decoder;
}

void write(ColumnsDecoder& decoder, const py::buffer& buffer, size_t count) {
  const py::buffer_info info = buffer.request();
  if (count > static_cast<size_t>(info.size * info.itemsize)) throw std::invalid_argument("more than the buffer holds");
  const py::gil_scoped_release release;
  with_memory_errors([&] { decoder.write(static_cast<const std::byte*>(info.ptr), count); });
}

std::shared_ptr<Columns> finish(ColumnsDecoder& decoder) {
  auto columns = std::make_shared<Columns>();
  const py::gil_scoped_release release;
  with_memory_errors([&] { *columns = decoder.finish(); });
  return columns;
}

}  // namespace

void bind_metadata_stream(py::module_& module) {
  module.attr("COLUMNS_SECTIONS") = metadata::section_count();
  py::class_<ColumnsEncoder>(module, "ColumnsEncoder")
      .def_property_readonly("sizes", &ColumnsEncoder::sizes)
      .def("read", &read, py::arg("buffer"));
  module.def("encode_columns", &encode_columns, py::arg("columns"), py::arg("file_bytes"));
  py::class_<ColumnsDecoder>(module, "ColumnsDecoder")
      .def(py::init(&make_decoder), py::arg("sizes"), py::arg("file_bytes"))
      .def("write", &write, py::arg("buffer"), py::arg("count"))
      .def("finish", &finish);
}

}  // namespace dcp_fast
