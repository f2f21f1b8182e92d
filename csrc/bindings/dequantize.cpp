// Dequantization for Python.

#include "copy/dequantize.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/column.h"
#include "bindings/python.h"
#include "checkpoint/dtype.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

// How elements and scales are stored, as Python tells it.
struct StoredKind {
  copy::Quantization quantization;
  copy::Scales scales;
  checkpoint::DType stored;
};

// `stored`: a dtype, or -1 for MXFP4.
StoredKind kind_of(int64_t stored, bool exponents) {
  if (stored >= static_cast<int64_t>(checkpoint::kDTypes.size())) throw py::index_error("no such dtype");
  return {stored < 0 ? copy::Quantization::kMxfp4 : copy::Quantization::kElements,
          exponents ? copy::Scales::kE8M0 : copy::Scales::kFloat32,
          stored < 0 ? checkpoint::kUnknownDType : static_cast<checkpoint::DType>(stored)};
}

checkpoint::DType dtype_of(int64_t code) {
  if (code < checkpoint::kUnknownDType || code >= static_cast<int64_t>(checkpoint::kDTypes.size())) {
    throw py::index_error("no such dtype");
  }
  return static_cast<checkpoint::DType>(code);
}

bool can_dequantize(int64_t stored, bool exponents, int64_t target, int64_t destination) {
  const StoredKind kind = kind_of(stored, exponents);
  return copy::find_dequantization(kind.quantization, kind.scales, kind.stored, dtype_of(target), dtype_of(destination),
                                   true)
      .has_value();
}

struct BoxTask {
  copy::Dequantization how;
  copy::QuantizedBox box;
};

void dequantize(const py::buffer& rows) {
  Column column(rows);
  std::vector<BoxTask> tasks;
  while (!column.done()) {
    const int64_t stored = column.next();
    const StoredKind kind = kind_of(stored, column.next() != 0);
    const checkpoint::DType target = dtype_of(column.next());
    const checkpoint::DType destination = dtype_of(column.next());
    BoxTask task;
    copy::QuantizedBox& box = task.box;
    box.rows = column.next();
    box.columns = column.next();
    box.from = reinterpret_cast<const std::byte*>(column.next());  // NOLINT(performance-no-int-to-ptr)
    box.from_stride = column.next();
    box.scales = reinterpret_cast<const std::byte*>(column.next());  // NOLINT(performance-no-int-to-ptr)
    box.scales_stride = column.next();
    constexpr auto kMost = static_cast<size_t>(std::numeric_limits<int64_t>::max());
    box.block_rows = static_cast<int64_t>(column.next_index(kMost));
    box.block_columns = static_cast<int64_t>(column.next_index(kMost));
    if (box.block_rows == 0 || box.block_columns == 0) throw py::value_error("blocks without elements");
    box.first_row = static_cast<int64_t>(column.next_index(static_cast<size_t>(box.block_rows)));
    box.first_column = static_cast<int64_t>(column.next_index(static_cast<size_t>(box.block_columns)));
    box.to = reinterpret_cast<std::byte*>(column.next());  // NOLINT(performance-no-int-to-ptr)
    box.to_row_stride = column.next();
    box.to_column_stride = column.next();
    const auto bytes = destination == checkpoint::kUnknownDType ? 0 : checkpoint::info(destination).itemsize;
    const auto how = copy::find_dequantization(kind.quantization, kind.scales, kind.stored, target, destination,
                                               box.to_column_stride == bytes);
    if (!how) throw py::value_error("no dequantization between such dtypes");
    task.how = *how;
    tasks.push_back(task);
  }
  const py::gil_scoped_release release;
  for (const BoxTask& task : tasks) copy::dequantize(task.how, task.box);
}

}  // namespace

void bind_dequantize(py::module_& module) {
  module.def("can_dequantize", &can_dequantize, py::arg("stored"), py::arg("exponents"), py::arg("target"),
             py::arg("destination"),
             "Whether there is a dequantization between such dtypes, given as codes; `stored` is -1 for MXFP4.");
  module.def("dequantize", &dequantize, py::arg("rows"),
             "Dequantizes boxes from memory to memory. A row for each: stored dtype as above, 1 if its scales are E8M0 "
             "else 0, target dtype, dtype of the destination, and the fields of QuantizedBox.");
}

}  // namespace dcp_fast
