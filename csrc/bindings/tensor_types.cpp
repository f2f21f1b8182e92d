#include "bindings/tensor_types.h"

#include <utility>

#include "bindings/python.h"

namespace py = pybind11;

namespace dcp_fast {

TensorTypes::TensorTypes(py::object dtensor, py::tuple whole, py::tuple overrides)
    : dtensor_(std::move(dtensor)), whole_(std::move(whole)), overrides_(std::move(overrides)) {}

bool TensorTypes::is_whole_type(PyObject* value) const {
  return contains(whole_, reinterpret_cast<PyObject*>(Py_TYPE(value)));
}

bool TensorTypes::is_whole(PyObject* value) const { return is_whole_type(value) && has_no_attributes(value); }

py::object TensorTypes::local_of(PyObject* value) const {
  if (!is_dtensor(value) || has_attribute_of(value, overrides_)) return {};
  py::object local = local_attribute_of(value);
  return local && is_whole(local.ptr()) ? std::move(local) : py::object();
}

py::object TensorTypes::local_attribute_of(PyObject* dtensor) {
  static const py::handle name = PyUnicode_InternFromString("_local_tensor");  // is never freed
  return attribute(dtensor, name);
}

}  // namespace dcp_fast
