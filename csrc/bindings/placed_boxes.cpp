#include "bindings/placed_boxes.h"

#include <algorithm>
#include <utility>

#include "bindings/python.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

// How often a tensor was written to; always 0 in inference mode, where nobody counts, and of what is no tensor.
int64_t version_of(PyObject* tensor) {
  static const py::handle name = PyUnicode_InternFromString("_version");  // is never freed
  const py::object version = attribute(tensor, name);
  return version && PyLong_Check(version.ptr()) != 0 ? PyLong_AsLongLong(version.ptr()) : 0;
}

}  // namespace

PlacedBoxes::PlacedBoxes(PlainTensors plain, py::list fqns, py::list values, std::vector<size_t> numbers,
                         py::list tensors, TensorTypes types)
    : plain_(std::move(plain)),
      fqns_(std::move(fqns)),
      values_(std::move(values)),
      numbers_(std::move(numbers)),
      tensors_(std::move(tensors)),
      types_(std::move(types)),
      is_known_(numbers_.size()),
      versions_(numbers_.size()) {
  if (fqns_.size() != numbers_.size() || values_.size() != numbers_.size()) throw py::value_error("lengths differ");
  int refused = 0;
  for (const py::handle tensor : tensors_) {
    const size_t begin = geometry_.size();
    if (!plain_.add(tensor.ptr(), geometry_, refused)) geometry_.resize(begin);
    rows_.push_back({begin, geometry_.size()});
  }
  for (size_t box = 0; box < numbers_.size(); ++box) {
    const Range row = rows_.at(numbers_[box]);
    is_known_[box] = row.begin != row.end &&
                     is_or_has(PyList_GET_ITEM(values_.ptr(), static_cast<py::ssize_t>(box)), tensor_of(box));
  }
}

std::vector<size_t> PlacedBoxes::others() const {
  std::vector<size_t> others;
  for (size_t box = 0; box < numbers_.size(); ++box) {
    if (!is_known_[box]) others.push_back(box);
  }
  return others;
}

bool PlacedBoxes::are_as_resolved(const py::object& state_dict, const std::vector<size_t>& boxes,
                                  const py::function& look) const {
  return std::all_of(boxes.begin(), boxes.end(), [&](size_t box) { return is_as_resolved(state_dict, box, look); });
}

void PlacedBoxes::keep_versions(const std::vector<size_t>& boxes) {
  for (const size_t box : boxes) versions_.at(box) = writes_to(box);
}

bool PlacedBoxes::is_as_placed(const py::object& state_dict, size_t box, const py::function& look) const {
  return is_as_resolved(state_dict, box, look) && writes_to(box) == versions_[box];
}

bool PlacedBoxes::is_as_resolved(const py::object& state_dict, size_t box, const py::function& look) const {
  if (!is_known_.at(box) || !PyDict_CheckExact(state_dict.ptr())) return look(box).cast<bool>();
  const auto index = static_cast<py::ssize_t>(box);
  PyObject* const value = PyDict_GetItemWithError(state_dict.ptr(), PyList_GET_ITEM(fqns_.ptr(), index));
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  PyObject* const tensor = tensor_of(box);
  if (value != PyList_GET_ITEM(values_.ptr(), index) || !is_or_has(value, tensor)) return false;
  row_.clear();
  int refused = 0;
  const Range row = rows_[numbers_[box]];
  const auto geometry = geometry_.begin();
  return plain_.add(tensor, row_, refused) &&
         std::equal(row_.begin(), row_.end(), geometry + static_cast<std::ptrdiff_t>(row.begin),
                    geometry + static_cast<std::ptrdiff_t>(row.end));
}

// Whether a value is a tensor, or a DTensor with this local one.
bool PlacedBoxes::is_or_has(PyObject* value, PyObject* tensor) const {
  return value == tensor || types_.local_of(value).ptr() == tensor;
}

// Neither of the two counters goes back. Operations on a DTensor count with it alone, not with its local tensor.
int64_t PlacedBoxes::writes_to(size_t box) const {
  PyObject* const tensor = tensor_of(box);
  PyObject* const value = PyList_GET_ITEM(values_.ptr(), static_cast<py::ssize_t>(box));
  return version_of(tensor) + (value == tensor ? 0 : version_of(value));
}

PyObject* PlacedBoxes::tensor_of(size_t box) const {
  return PyList_GET_ITEM(tensors_.ptr(), static_cast<py::ssize_t>(numbers_[box]));
}

}  // namespace dcp_fast
