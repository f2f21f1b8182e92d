// Tensors of Python on the host whose memory holds their elements as they are; see dcp_fast/transfer/destinations.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/rows.h"

namespace dcp_fast {

// Asks tensors what they are: most of it at once, as each question by a name takes tens of nanoseconds.
class PlainTensors {
 public:
  // `api` is the table of functions of the classes `types`, in a capsule; without one no tensor is plain. `dtypes`,
  // with code and bytes of an element, are those that plain tensors may have: DLPack calls several of torch's the same.
  PlainTensors(pybind11::tuple types, const pybind11::object& api, pybind11::dict dtypes);

  // Appends the row of a plain tensor: address, device, dtype, bytes of an element, dimensions, sizes, strides. False
  // for any other one; the row is of no use then. Attributes of a tensor's own may hide what is asked of it.
  // `refused` counts tensors that DLPack refuses to describe. torch takes a millisecond to say so, so that none is
  // asked any more after the first few.
  bool add(PyObject* tensor, std::vector<int64_t>& rows, int& refused) const;

  // A row for each tensor, of which `other` makes those that are not plain; and whether all that have elements have
  // addresses.
  std::pair<Rows, bool> rows(const pybind11::list& tensors, const pybind11::function& other) const;

 private:
  pybind11::tuple types_;
  const dlpack::ExchangeApi* api_ = nullptr;
  pybind11::dict dtypes_;
};

}  // namespace dcp_fast
