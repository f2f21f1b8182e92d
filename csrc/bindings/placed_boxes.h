// Boxes of a load whose planner has a hook that may change where they go, or what is there.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/plain_tensors.h"
#include "bindings/tensor_types.h"

namespace dcp_fast {

// How the destinations of boxes were when all of them were resolved, and when some were placed. It knows plain tensors
// and DTensors that have one; `look`, a function that is given a box, knows all others.
class PlacedBoxes {
 public:
  // `fqns` and `values` of a state dict, and `numbers` of the tensors that they go into, are of each box.
  PlacedBoxes(PlainTensors plain, pybind11::list fqns, pybind11::list values, std::vector<size_t> numbers,
              pybind11::list tensors, TensorTypes types);

  // The boxes of which only `look` knows.
  std::vector<size_t> others() const;

  // Whether the state dict has all of these boxes where they were resolved.
  bool are_as_resolved(const pybind11::object& state_dict, const std::vector<size_t>& boxes,
                       const pybind11::function& look) const;

  // These boxes are in place.
  void keep_versions(const std::vector<size_t>& boxes);

  // Has a planner commit a window, whose boxes are in place: an item is the number of a box, or ~ that of an entry for
  // `load_bytes`. `items` are the ReadItems of its boxes. `other` makes, of a box and its item, tensors that are more
  // than a part of a plain one along its first dimension. Ends early where a box is no longer in place, and where
  // `has_changed` says after an item that the others may depend on it. How many were committed, and whether it said so.
  std::pair<size_t, bool> commit(const pybind11::object& planner, const std::vector<int64_t>& window,
                                 const pybind11::list& items, const pybind11::function& look,
                                 const pybind11::function& other, const pybind11::function& load_bytes,
                                 const pybind11::function& has_changed) const;

 private:
  struct Range {
    size_t begin, end;
  };

  bool is_as_resolved(const pybind11::object& state_dict, size_t box, const pybind11::function& look) const;
  // The tensor that is a box and a part of its destination, if the state dict has it where it was placed, and nobody
  // wrote to it since; else None.
  pybind11::object target(const pybind11::object& state_dict, size_t box, const pybind11::object& item,
                          const pybind11::function& look, const pybind11::function& other) const;
  pybind11::object first_rows(PyObject* tensor, const pybind11::object& item) const;
  bool is_or_has(PyObject* value, PyObject* tensor) const;
  int64_t writes_to(size_t box) const;
  PyObject* tensor_of(size_t box) const;

  PlainTensors plain_;
  pybind11::list fqns_;
  pybind11::list values_;
  std::vector<size_t> numbers_;
  pybind11::list tensors_;
  TensorTypes types_;
  std::vector<bool> is_known_;        // by box
  std::vector<Range> rows_;           // by tensor, in numbers; empty if it is not plain
  std::vector<int64_t> geometry_;     // rows of all plain tensors
  std::vector<int64_t> versions_;     // by box
  mutable std::vector<int64_t> row_;  // of the plain tensor that was looked at last
};

}  // namespace dcp_fast
