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

}  // namespace

void bind_elements(py::module_& module) { module.def("holds", &holds, py::arg("container"), py::arg("elements")); }

}  // namespace dcp_fast
