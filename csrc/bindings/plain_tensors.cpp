#include "bindings/plain_tensors.h"

#include <algorithm>
#include <cstddef>
#include <tuple>

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

uint32_t key_of(dlpack::DataType dtype) {
  return uint32_t{dtype.code} << 24U | uint32_t{dtype.bits} << 16U | uint32_t{dtype.lanes};
}

bool is_negated(PyObject* tensor) {
  static const py::handle name = PyUnicode_InternFromString("is_neg");  // is never freed
  return checked(PyObject_CallMethodObjArgs(tensor, name.ptr(), nullptr)).ptr() != Py_False;
}

}  // namespace

PlainTensors::PlainTensors(py::tuple types, const py::object& api, const py::list& samples) : types_(std::move(types)) {
  if (PyCapsule_IsValid(api.ptr(), dlpack::kCapsule) == 0) return;
  const auto* const found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), dlpack::kCapsule));
  if (found->major != dlpack::kMajor) return;
  api_ = found;
  for (const py::handle sample : samples) {
    const auto [tensor, code, itemsize] = sample.cast<std::tuple<py::object, int64_t, int64_t>>();
    dlpack::Tensor described{};
    if (api_->describe(tensor.ptr(), &described) == 0) {
      const bool is_new = kinds_.emplace(key_of(described.dtype), Kind{code, itemsize}).second;
      if (!is_new) throw py::value_error("two dtypes are one for DLPack");
    } else {
      PyErr_Clear();  // it does not know this dtype
    }
  }
}

bool PlainTensors::is_known(PyObject* tensor) const {
  return std::any_of(types_.begin(), types_.end(),
                     [&](py::handle type) { return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(tensor)); });
}

bool PlainTensors::add(PyObject* tensor, std::vector<int64_t>& rows, int& refused) const {
  if (api_ == nullptr || refused == kMostRefused || !is_known(tensor) || !has_no_attributes(tensor)) return false;
  dlpack::Tensor described{};
  if (api_->describe(tensor, &described) != 0) {
    ++refused;
    PyErr_Clear();  // no elements in memory, or none that DLPack has a name for
    return false;
  }
  const auto kind = kinds_.find(key_of(described.dtype));
  if (kind == kinds_.end() || described.device_type != dlpack::kCpu || is_negated(tensor)) return false;
  const auto address = reinterpret_cast<uintptr_t>(described.data) + described.byte_offset;
  rows.insert(rows.end(), {static_cast<int64_t>(address), transfer::kHost, kind->second.code, kind->second.itemsize,
                           described.dims});
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
