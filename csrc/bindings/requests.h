// What is wanted of the tensors of a state dict: rows for planning::find_boxes, of most tensors without a call of
// Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "bindings/tensor_types.h"
#include "metadata/columns.h"

namespace dcp_fast {

// One request for each tensor. The geometry of DTensors (mesh, placements, shape of the global tensor) tells what a
// rank holds of them, so that it is asked for once for all that are alike.
class Requests {
 public:
  // `made` has the entries that exist as objects, which somebody may have changed: these are left to Python.
  // `placements`: types whose equal instances split a tensor in the same way.
  Requests(std::shared_ptr<const metadata::Columns> columns, pybind11::dict made, TensorTypes types,
           pybind11::tuple placements);

  // Calls `other` with key and value of all items that it cannot add by itself, when it is their turn.
  void add_all(const pybind11::iterable& items, const pybind11::function& other);

  // `values`: offsets and sizes of all chunks in a row.
  void add(const pybind11::object& fqn, int64_t entry, const pybind11::list& chunks,
           const std::vector<int64_t>& values);

  // From now on DTensors of the same geometry as this one are wanted in these chunks.
  void learn(const pybind11::object& dtensor, const pybind11::list& chunks, const std::vector<int64_t>& values);

  const std::shared_ptr<const metadata::Columns>& columns() const { return columns_; }
  const std::vector<int64_t>& rows() const { return rows_; }
  // Of each request its FQN, and the chunks that are wanted: None for a whole tensor.
  const pybind11::list& fqns() const { return fqns_; }
  const pybind11::list& wanted() const { return wanted_; }

 private:
  struct Wanted {
    pybind11::list chunks;
    std::vector<int64_t> row;  // the number of chunks, and their offsets and sizes
  };
  struct Placed {
    pybind11::object mesh;  // is alive as long as its address stands for it
    pybind11::object placements;
    std::map<std::vector<int64_t>, Wanted> by_shape;
  };
  using OnMesh = std::vector<Placed>;

  void fetch_ahead(PyObject* value) const;
  bool add_alone(const pybind11::object& fqn, const pybind11::object& value);
  bool add_whole(const pybind11::object& fqn, const pybind11::object& value, uint32_t number);
  bool add_like_before(const pybind11::object& fqn, const pybind11::object& value, uint32_t number);
  // The shape of a tensor, in shape_. False if it is not of plain numbers.
  bool take_shape(PyObject* tensor);
  bool has_size(uint32_t number) const;  // shape_
  Placed* find_placed(const pybind11::object& mesh, const pybind11::object& placements);
  bool are_known_placements(const pybind11::object& placements) const;

  std::shared_ptr<const metadata::Columns> columns_;
  pybind11::dict made_;
  TensorTypes types_;
  pybind11::tuple placements_;
  std::vector<int64_t> rows_;
  pybind11::list fqns_;
  pybind11::list wanted_;
  std::unordered_map<PyObject*, OnMesh> by_mesh_;
  uint32_t next_ = 0;           // the entry that may be found next
  std::vector<int64_t> shape_;  // kept for its memory
};

}  // namespace dcp_fast
