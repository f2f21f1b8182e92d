// Dequantization for Python.

#include "copy/dequantize.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "bindings/quantized_rows.h"
#include "checkpoint/dtype.h"
#include "cuda/dequantize_launch.h"
#include "cuda/pinned_ring.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

bool can_dequantize(int64_t stored, bool exponents, int64_t target, int64_t destination) {
  const StoredKind kind = kind_of(stored, exponents);
  return copy::find_dequantization(kind.quantization, kind.scales, kind.stored, dtype_of(target), dtype_of(destination),
                                   true)
      .has_value();
}

void dequantize(const py::buffer& rows) {
  const std::vector<QuantizedRow> boxes = rows_of(rows);
  std::vector<copy::Dequantization> how;
  how.reserve(boxes.size());
  for (const QuantizedRow& row : boxes) how.push_back(row.dequantization());
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
  for (const auto& [kind, target, destination, box] : rows_of(rows)) {
    const auto formats = formats_on_device(kind, target, destination);
    if (!formats) throw py::value_error("no dequantization between such dtypes");
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
