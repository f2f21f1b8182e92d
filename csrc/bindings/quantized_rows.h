// Rows of Python that tell how boxes are dequantized.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/column.h"
#include "checkpoint/dtype.h"
#include "copy/dequantize.h"

namespace dcp_fast {

// How elements and scales are stored, as Python tells it.
struct StoredKind {
  copy::Quantization quantization;
  copy::Scales scales;
  checkpoint::DType stored;
};

// `stored`: a dtype, or -1 for MXFP4.
StoredKind kind_of(int64_t stored, bool exponents);
checkpoint::DType dtype_of(int64_t code);

// A box, and what is to be done with it.
struct QuantizedRow {
  StoredKind kind;
  checkpoint::DType target;
  checkpoint::DType destination;
  copy::QuantizedBox box;

  // Throws py::value_error if there is none between its dtypes.
  copy::Dequantization dequantization() const;
};

QuantizedRow next_row(Column& column);
std::vector<QuantizedRow> rows_of(const pybind11::buffer& rows);

}  // namespace dcp_fast
