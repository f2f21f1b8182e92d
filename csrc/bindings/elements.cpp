// Whether containers hold the very objects that they held before; see dcp_fast/transfer/planner_state.py.

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

// Keys, if `keys` is set, and values of a dict, one behind another.
bool dict_holds(PyObject* dict, const py::list& elements, bool keys) {
  const auto count = PyDict_GET_SIZE(dict);
  if (PyList_GET_SIZE(elements.ptr()) != (keys ? 2 * count : count)) return false;
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  py::ssize_t position = 0;
  for (py::ssize_t i = 0; PyDict_Next(dict, &position, &key, &value) != 0; ++i) {
    if (keys && PyList_GET_ITEM(elements.ptr(), i) != key) return false;
    if (PyList_GET_ITEM(elements.ptr(), keys ? count + i : i) != value) return false;
  }
  return true;
}

// Of a class the elements are the values of its attributes. None if the container is of another kind.
py::object holds(const py::object& container, const py::list& elements) {
  PyObject* const object = container.ptr();
  if (PyDict_CheckExact(object)) return py::bool_(dict_holds(object, elements, true));
  if (PyType_Check(object)) {
    auto* const type = reinterpret_cast<PyTypeObject*>(object);
    if (PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE) == 0) return py::none();
    return py::bool_(dict_holds(type->tp_dict, elements, false));
  }
  if (!PyList_CheckExact(object)) return py::none();
  const auto count = PyList_GET_SIZE(object);
  bool same = PyList_GET_SIZE(elements.ptr()) == count;
  for (py::ssize_t i = 0; same && i < count; ++i) {
    same = PyList_GET_ITEM(object, i) == PyList_GET_ITEM(elements.ptr(), i);
  }
  return py::bool_(same);
}

// Whether containers, each with the elements that it held, hold them still, and others, each with its length, are as
// long as they were. Containers that holds() says nothing of are for others to look at.
bool all_hold(const py::list& watched, const py::list& lengths) {
  for (const py::handle pair : watched) {
    PyObject* const container = PyTuple_GET_ITEM(pair.ptr(), 0);
    const auto elements = py::reinterpret_borrow<py::list>(PyTuple_GET_ITEM(pair.ptr(), 1));
    if (holds(py::reinterpret_borrow<py::object>(container), elements).ptr() == Py_False) return false;
  }
  for (const py::handle pair : lengths) {
    const auto length = PyObject_Size(PyTuple_GET_ITEM(pair.ptr(), 0));
    if (length < 0) throw py::error_already_set();
    if (length != PyLong_AsSsize_t(PyTuple_GET_ITEM(pair.ptr(), 1))) return false;
  }
  return true;
}

}  // namespace

void bind_elements(py::module_& module) {
  module.def("holds", &holds, py::arg("container"), py::arg("elements"));
  module.def("all_hold", &all_hold, py::arg("watched"), py::arg("lengths"));
}

}  // namespace dcp_fast
