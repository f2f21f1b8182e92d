// Texts and tuples of Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dcp_fast {

// Lone surrogates are texts too, as for pickle.
inline pybind11::str to_python(std::string_view text, const char* errors = "surrogatepass") {
  PyObject* result = PyUnicode_DecodeUTF8(text.data(), static_cast<pybind11::ssize_t>(text.size()), errors);
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::str>(result);
}

inline std::string from_python(const pybind11::str& text) {
  PyObject* encoded = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass");
  if (encoded == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::bytes>(encoded);
}

inline pybind11::tuple to_python(const int64_t* numbers, size_t count) {
  pybind11::tuple result(count);
  for (size_t i = 0; i < count; ++i) result[i] = numbers[i];
  return result;
}

}  // namespace dcp_fast
