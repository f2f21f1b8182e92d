// Dequantization for Python.

#include "copy/dequantize.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/column.h"
#include "bindings/python.h"
#include "checkpoint/dtype.h"
#include "cuda/dequantize_launch.h"
#include "cuda/pinned_ring.h"

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

// A box, and what is to be done with it.
struct BoxRow {
  StoredKind kind;
  checkpoint::DType target;
  checkpoint::DType destination;
  copy::QuantizedBox box;
};

std::vector<BoxRow> boxes_of(const py::buffer& rows) {
  Column column(rows);
  std::vector<BoxRow> boxes;
  while (!column.done()) {
    BoxRow row;
    const int64_t stored = column.next();
    row.kind = kind_of(stored, column.next() != 0);
    row.target = dtype_of(column.next());
    row.destination = dtype_of(column.next());
    copy::QuantizedBox& box = row.box;
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
    boxes.push_back(row);
  }
  return boxes;
}

[[noreturn]] void refuse_dtypes() { throw py::value_error("no dequantization between such dtypes"); }

void dequantize(const py::buffer& rows) {
  const std::vector<BoxRow> boxes = boxes_of(rows);
  std::vector<copy::Dequantization> how;
  for (const auto& [kind, target, destination, box] : boxes) {
    const auto bytes = destination == checkpoint::kUnknownDType ? 0 : checkpoint::info(destination).itemsize;
    const auto found = copy::find_dequantization(kind.quantization, kind.scales, kind.stored, target, destination,
                                                 box.to_column_stride == bytes);
    if (!found) refuse_dtypes();
    how.push_back(*found);
  }
  const py::gil_scoped_release release;
  for (size_t i = 0; i < boxes.size(); ++i) copy::dequantize(how[i], boxes[i].box);
}

// None if the kernel does not know one of the dtypes.
std::optional<cuda::DequantizedFormats> formats_on_device(const StoredKind& kind, checkpoint::DType target,
                                                          checkpoint::DType destination) {
  const auto stored = cuda::stored_elements(kind.quantization, kind.stored);
  const auto rounded = cuda::resulting_elements(target);
  const auto placed = cuda::resulting_elements(destination);
  if (!stored || !rounded || !placed) return std::nullopt;
  return cuda::DequantizedFormats{*stored, *rounded, *placed, kind.scales};
}

bool can_dequantize_on_device(int64_t stored, int64_t target, int64_t destination) {
  return formats_on_device(kind_of(stored, false), dtype_of(target), dtype_of(destination)).has_value();
}

void dequantize_on_device(cuda::PinnedRing& ring, int device, uint64_t stream, const py::buffer& rows) {
  std::vector<cuda::BoxDequantization> boxes;
  for (const auto& [kind, target, destination, box] : boxes_of(rows)) {
    const auto formats = formats_on_device(kind, target, destination);
    if (!formats) refuse_dtypes();
    boxes.push_back(cuda::describe(*formats, box));
  }
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  auto* const torch_stream = reinterpret_cast<cuda::StreamHandle>(stream);
  const py::gil_scoped_release release;
  ring.device(device).dequantize(torch_stream, boxes);
}

}  // namespace

void bind_dequantize(py::module_& module) {
  module.def("can_dequantize", &can_dequantize, py::arg("stored"), py::arg("exponents"), py::arg("target"),
             py::arg("destination"),
             "Whether there is a dequantization between such dtypes, given as codes; `stored` is -1 for MXFP4.");
  module.def("dequantize", &dequantize, py::arg("rows"),
             "Dequantizes boxes from memory to memory. A row for each: stored dtype as above, 1 if its scales are E8M0 "
             "else 0, target dtype, dtype of the destination, and the fields of QuantizedBox.");
  module.def("can_dequantize_on_device", &can_dequantize_on_device, py::arg("stored"), py::arg("target"),
             py::arg("destination"), "As can_dequantize, of the kernel. Scales are float32 or E8M0.");
  module.def("dequantize_on_device", &dequantize_on_device, py::arg("ring"), py::arg("device"), py::arg("stream"),
             py::arg("rows"),
             "Enqueues the same for boxes on a device, on torch's current stream there. Each row has addresses of the "
             "device, aligned as what lies there, and at most 2^31 - 1 elements.");
}

}  // namespace dcp_fast
