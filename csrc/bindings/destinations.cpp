// Tensors of Python as rows for the transfer program; see dcp_fast/transfer/destinations.py.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "bindings/rows.h"
#include "transfer/program.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

// Names of attributes and methods, which are never freed.
struct TensorNames {
  py::handle layout = PyUnicode_InternFromString("layout");
  py::handle dtype = PyUnicode_InternFromString("dtype");
  py::handle is_cpu = PyUnicode_InternFromString("is_cpu");
  py::handle is_neg = PyUnicode_InternFromString("is_neg");
  py::handle data_ptr = PyUnicode_InternFromString("data_ptr");
  py::handle shape = PyUnicode_InternFromString("shape");
  py::handle stride = PyUnicode_InternFromString("stride");
};

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// What is asked of a tensor, which may take tens of nanoseconds each; of thousands of tensors that adds up.
class Plain {
 public:
  Plain(const py::tuple& types, const py::object& strided, const py::dict& dtypes)
      : types_(types), strided_(strided), dtypes_(dtypes) {}

  // Appends the row of a tensor on the host whose memory holds its elements as they are. False for any other one; the
  // row is of no use then. Attributes of a tensor's own may hide what is asked of it.
  bool add(PyObject* tensor, std::vector<int64_t>& rows) const {
    if (!is_known(tensor) || !has_no_attributes(tensor) || !get(tensor, names_.layout).is(strided_)) return false;
    const py::object dtype = get(tensor, names_.dtype);
    PyObject* const kind = PyDict_GetItemWithError(dtypes_.ptr(), dtype.ptr());
    if (kind == nullptr) {
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      return false;
    }
    if (!get(tensor, names_.is_cpu).is(py::bool_(true)) || !call(tensor, names_.is_neg).is(py::bool_(false)))
      return false;
    const py::object sizes = get(tensor, names_.shape);
    const py::object strides = call(tensor, names_.stride);
    if (!PyTuple_Check(sizes.ptr()) || !PyTuple_Check(strides.ptr())) return false;
    const auto dims = PyTuple_GET_SIZE(sizes.ptr());
    if (PyTuple_GET_SIZE(strides.ptr()) != dims) return false;
    const int64_t address = integer(call(tensor, names_.data_ptr).ptr());
    rows.insert(rows.end(), {address, transfer::kHost, integer(PyTuple_GET_ITEM(kind, 0)),
                             integer(PyTuple_GET_ITEM(kind, 1)), dims});
    bool is_empty = false;
    for (py::ssize_t dim = 0; dim < dims; ++dim) {
      rows.push_back(integer(PyTuple_GET_ITEM(sizes.ptr(), dim)));
      is_empty = is_empty || rows.back() == 0;
    }
    for (py::ssize_t dim = 0; dim < dims; ++dim) rows.push_back(integer(PyTuple_GET_ITEM(strides.ptr(), dim)));
    return address != 0 || is_empty;
  }

 private:
  static py::object get(PyObject* tensor, py::handle name) { return checked(PyObject_GetAttr(tensor, name.ptr())); }
  static py::object call(PyObject* tensor, py::handle name) {
    return checked(PyObject_CallMethodObjArgs(tensor, name.ptr(), nullptr));
  }
  bool is_known(PyObject* tensor) const {
    return std::any_of(types_.begin(), types_.end(),
                       [&](py::handle type) { return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(tensor)); });
  }

  const py::tuple& types_;
  const py::object& strided_;
  const py::dict& dtypes_;
  const TensorNames names_;
};

std::pair<Rows, bool> destination_rows(const py::list& tensors, const py::tuple& types, const py::object& strided,
                                       const py::dict& dtypes, const py::function& other) {
  const Plain plain(types, strided, dtypes);
  Rows rows;
  bool all_have_addresses = true;
  for (const py::handle tensor : tensors) {
    const size_t begin = rows.values.size();
    if (plain.add(tensor.ptr(), rows.values)) continue;  // it has an address, or no elements
    rows.values.resize(begin);
    for (const py::handle number : py::tuple(other(tensor))) rows.values.push_back(integer(number.ptr()));
    const auto sizes = rows.values.begin() + static_cast<std::ptrdiff_t>(begin) + 5;
    const bool is_empty = std::find(sizes, sizes + rows.values.at(begin + 4), 0) != sizes + rows.values.at(begin + 4);
    all_have_addresses = all_have_addresses && (is_empty || rows.values[begin] != 0);
  }
  return {std::move(rows), all_have_addresses};
}

}  // namespace

void bind_destinations(py::module_& module) {
  module.def("destination_rows", &destination_rows, py::arg("tensors"), py::arg("types"), py::arg("strided"),
             py::arg("dtypes"), py::arg("other"),
             "A row for each tensor, as Program takes them, and whether all that have elements have addresses. `types` "
             "and `dtypes` (with code and bytes of an element) are those of tensors that are plain if they are strided "
             "and not negated; `other` makes the row of any other.");
}

}  // namespace dcp_fast
