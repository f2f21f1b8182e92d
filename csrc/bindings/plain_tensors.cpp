#include "bindings/plain_tensors.h"

#include <algorithm>
#include <cstddef>

#include "bindings/python.h"
#include "transfer/program.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

constexpr int kMostRefused = 8;

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

bool is_negated(PyObject* tensor) {
  static const py::handle name = PyUnicode_InternFromString("is_neg");  // is never freed
  return checked(PyObject_CallMethodObjArgs(tensor, name.ptr(), nullptr)).ptr() != Py_False;
}

}  // namespace

PlainTensors::PlainTensors(py::tuple types, const py::object& api, py::dict dtypes)
    : types_(std::move(types)), dtypes_(std::move(dtypes)) {
  if (PyCapsule_IsValid(api.ptr(), dlpack::kCapsule) == 0) return;
  const auto* const found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), dlpack::kCapsule));
  if (found->major == dlpack::kMajor && found->describe != nullptr) api_ = found;
}

bool PlainTensors::add(PyObject* tensor, std::vector<int64_t>& rows, int& refused) const {
  if (api_ == nullptr || refused == kMostRefused || !contains(types_, reinterpret_cast<PyObject*>(Py_TYPE(tensor))) ||
      !has_no_attributes(tensor))
    return false;
  static const py::handle dtype_name = PyUnicode_InternFromString("dtype");  // is never freed
  const py::object dtype = checked(PyObject_GetAttr(tensor, dtype_name.ptr()));
  PyObject* const kind = PyDict_GetItemWithError(dtypes_.ptr(), dtype.ptr());
  if (kind == nullptr) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return false;
  }
  if (is_negated(tensor)) return false;
  // Sizes and strides are the tensor's own: nothing may run in between that could change them.
  dlpack::Tensor described{};
  if (api_->describe(tensor, &described) != 0) {
    ++refused;
    PyErr_Clear();  // no elements in memory, or none that DLPack has a name for
    return false;
  }
  if (described.device_type != dlpack::kCpu) return false;
  const auto address = reinterpret_cast<uintptr_t>(described.data) + described.byte_offset;
  rows.insert(rows.end(), {static_cast<int64_t>(address), transfer::kHost, integer(PyTuple_GET_ITEM(kind, 0)),
                           integer(PyTuple_GET_ITEM(kind, 1)), described.dims});
  rows.insert(rows.end(), described.sizes, described.sizes + described.dims);
  rows.insert(rows.end(), described.strides, described.strides + described.dims);
  return address != 0 || std::count(described.sizes, described.sizes + described.dims, 0) != 0;
}

std::pair<Rows, bool> PlainTensors::rows(const py::list& tensors, const py::function& other) const {
  Rows rows;
  int refused = 0;
  bool all_have_addresses = true;
  for (const py::handle tensor : tensors) {
    const size_t begin = rows.values.size();
    if (add(tensor.ptr(), rows.values, refused)) continue;  // it has an address, or no elements
    rows.values.resize(begin);
    for (const py::handle number : py::tuple(other(tensor))) rows.values.push_back(integer(number.ptr()));
    const auto sizes = rows.values.begin() + static_cast<std::ptrdiff_t>(begin) + 5;
    const bool is_empty = std::find(sizes, sizes + rows.values.at(begin + 4), 0) != sizes + rows.values.at(begin + 4);
    all_have_addresses = all_have_addresses && (is_empty || rows.values[begin] != 0);
  }
  return {std::move(rows), all_have_addresses};
}

}  // namespace dcp_fast
