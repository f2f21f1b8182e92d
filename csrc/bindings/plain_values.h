// Python objects of pickles that hold plain values only: numbers, texts, bytes, None, lists, tuples and dicts.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <unordered_map>

namespace dcp_fast {

// Keeps what cannot change, so that equal pickles of such values give one object. For others each gives its own.
class PlainValues {
 public:
  // What Python's unpickler makes of a pickle of protocol 2 to 5; null if it holds anything else than plain values, or
  // is damaged. Throws error_already_set where memory runs out.
  pybind11::object parse(const std::string& pickle);

 private:
  std::unordered_map<std::string_view, pybind11::object> known_;  // views of pickles, which outlive this
};

}  // namespace dcp_fast
