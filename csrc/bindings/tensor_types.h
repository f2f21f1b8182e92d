// What a value of a state dict is, without a call of Python.
#pragma once

#include <pybind11/pybind11.h>

namespace dcp_fast {

// Of types only exact ones count: subclasses may do everything in another way.
class TensorTypes {
 public:
  // `whole`: types whose tensors are no parts of others, unless attributes of their own say so. `overrides`: names of
  // attributes by which a DTensor is more than its specification.
  TensorTypes(pybind11::object dtensor, pybind11::tuple whole, pybind11::tuple overrides);

  bool is_dtensor(PyObject* value) const { return reinterpret_cast<PyObject*>(Py_TYPE(value)) == dtensor_.ptr(); }
  bool is_whole_type(PyObject* value) const;
  // Whether a value is certainly a whole tensor.
  bool is_whole(PyObject* value) const;
  // The local tensor of a DTensor, if neither has attributes that tell more of it; else nothing.
  pybind11::object local_of(PyObject* value) const;
  // What local_of() looks at.
  static pybind11::object local_attribute_of(PyObject* dtensor);

 private:
  pybind11::object dtensor_;
  pybind11::tuple whole_;
  pybind11::tuple overrides_;
};

}  // namespace dcp_fast
