#include "bindings/quantized_rows.h"

#include <cstddef>
#include <limits>

namespace py = pybind11;

namespace dcp_fast {

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

copy::Dequantization QuantizedRow::dequantization() const {
  const auto bytes = destination == checkpoint::kUnknownDType ? 0 : checkpoint::info(destination).itemsize;
  const auto found = copy::find_dequantization(kind.quantization, kind.scales, kind.stored, target, destination,
                                               box.to_column_stride == bytes);
  if (!found) throw py::value_error("no dequantization between such dtypes");
  return *found;
}

QuantizedRow next_row(Column& column) {
  QuantizedRow row;
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
  return row;
}

std::vector<QuantizedRow> rows_of(const py::buffer& rows) {
  Column column(rows);
  std::vector<QuantizedRow> result;
  while (!column.done()) result.push_back(next_row(column));
  return result;
}

}  // namespace dcp_fast
