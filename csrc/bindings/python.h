// What the bindings have in common: signals, the GIL, paths, texts and tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "error.h"

namespace dcp_fast {

// True if a signal handler raised (Ctrl-C): its exception is then pending.
inline bool interrupted() {
  const pybind11::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <typename Function>
auto without_gil(const Function& function) {
  try {
    const pybind11::gil_scoped_release release;
    return function();
  } catch (const Interrupted&) {
    throw pybind11::error_already_set();
  }
}

// A reference that a call of Python's API gave; its exception if it gave none.
inline pybind11::object checked(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(object);
}

// An attribute, or nothing if it is not there.
inline pybind11::object attribute(PyObject* object, pybind11::handle name) {
  PyObject* const value = PyObject_GetAttr(object, name.ptr());
  if (value == nullptr) PyErr_Clear();
  return pybind11::reinterpret_steal<pybind11::object>(value);
}

inline bool contains(const pybind11::tuple& objects, const PyObject* object) {
  for (size_t i = 0; i < objects.size(); ++i) {
    if (PyTuple_GET_ITEM(objects.ptr(), i) == object) return true;
  }
  return false;
}

// What is in the object's __dict__; nothing if it has none yet. To ask for it by name would make one.
inline PyObject* attributes_of(PyObject* object) {
  PyObject** dict = _PyObject_GetDictPtr(object);
  return dict == nullptr ? nullptr : *dict;
}

inline bool has_no_attributes(PyObject* object) {
  PyObject* const dict = attributes_of(object);
  return dict == nullptr || PyDict_GET_SIZE(dict) == 0;
}

// Whether any of its own attributes has one of these names.
inline bool has_attribute_of(PyObject* object, const pybind11::tuple& names) {
  if (has_no_attributes(object)) return false;
  for (const pybind11::handle name : names) {
    const int found = PyDict_Contains(attributes_of(object), name.ptr());
    if (found < 0) throw pybind11::error_already_set();
    if (found != 0) return true;
  }
  return false;
}

// A path as Python's os functions pass it to the system: any bytes but NUL.
inline std::string system_path(const pybind11::str& path) {
  PyObject* encoded = nullptr;
  // ValueError for a NUL
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::bytes>(encoded);
}

// Accepts lone surrogates in texts, as pickle does.
inline pybind11::str to_python(std::string_view text, const char* errors = "surrogatepass") {
  PyObject* result = PyUnicode_DecodeUTF8(text.data(), static_cast<pybind11::ssize_t>(text.size()), errors);
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::str>(result);
}

// A text of Python's in UTF-8.
class Utf8 {
 public:
  explicit Utf8(const pybind11::str& text) {
    pybind11::ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);  // the text itself keeps it
    if (data == nullptr) {
      PyErr_Clear();
      encoded_ =
          pybind11::reinterpret_steal<pybind11::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
      if (!encoded_) throw pybind11::error_already_set();
      data = PyBytes_AS_STRING(encoded_.ptr());
      size = PyBytes_GET_SIZE(encoded_.ptr());
    }
    view_ = {data, static_cast<size_t>(size)};
  }

  std::string_view view() const { return view_; }

 private:
  pybind11::object encoded_;
  std::string_view view_;
};

inline pybind11::tuple to_python(const int64_t* numbers, size_t count) {
  pybind11::tuple result(count);
  for (size_t i = 0; i < count; ++i) result[i] = numbers[i];
  return result;
}

}  // namespace dcp_fast
