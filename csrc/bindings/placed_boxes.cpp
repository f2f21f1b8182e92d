#include "bindings/placed_boxes.h"

#include <algorithm>
#include <utility>

#include "bindings/python.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

constexpr size_t kDims = 4;  // of a row: see PlainTensors

// Names of attributes, which are never freed.
struct BoxNames {
  py::handle requires_grad = PyUnicode_InternFromString("requires_grad");
  py::handle dest_offsets = PyUnicode_InternFromString("dest_offsets");
  py::handle lengths = PyUnicode_InternFromString("lengths");
};

struct PlannerNames {
  py::handle state_dict = PyUnicode_InternFromString("state_dict");
  py::handle commit_tensor = PyUnicode_InternFromString("commit_tensor");
};

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

py::object PlacedBoxes::target(const py::object& state_dict, size_t box, const py::object& item,
                               const py::function& look, const py::function& other) const {
  row_.clear();
  if (!is_as_resolved(state_dict, box, look) || writes_to(box) != versions_[box]) return py::none();
  py::object part = row_.empty() ? py::object() : first_rows(tensor_of(box), item);
  return part ? std::move(part) : other(box, item);
}

std::pair<size_t, bool> PlacedBoxes::commit(const py::object& planner, const std::vector<int64_t>& window,
                                            const py::list& items, const py::function& look, const py::function& other,
                                            const py::function& load_bytes, const py::function& has_changed) const {
  static const PlannerNames names;
  size_t done = 0;
  size_t boxes = 0;
  for (const int64_t index : window) {
    if (index < 0) {
      load_bytes(~index);
    } else {
      const py::object item = items[boxes++];
      const py::object state_dict = checked(PyObject_GetAttr(planner.ptr(), names.state_dict.ptr()));
      const py::object box = target(state_dict, static_cast<size_t>(index), item, look, other);
      if (box.is_none()) return {done, false};
      checked(PyObject_CallMethodObjArgs(planner.ptr(), names.commit_tensor.ptr(), item.ptr(), box.ptr(), nullptr));
    }
    ++done;
    if (has_changed().cast<bool>()) return {done, true};
  }
  return {done, false};
}

// The rows of a tensor that an item wants, if these are not all of them, and of the other dimensions it wants all.
py::object PlacedBoxes::first_rows(PyObject* tensor, const py::object& item) const {
  static const BoxNames names;
  // Slices make views as narrow does, in two thirds of the time.
  if (!attribute(tensor, names.requires_grad).is(py::bool_(false))) return {};
  const py::object offsets = checked(PyObject_GetAttr(item.ptr(), names.dest_offsets.ptr()));
  const py::object lengths = checked(PyObject_GetAttr(item.ptr(), names.lengths.ptr()));
  const auto dims = static_cast<py::ssize_t>(row_[kDims]);
  if (dims == 0 || !PyTuple_Check(offsets.ptr()) || !PyTuple_Check(lengths.ptr())) return {};
  if (PyTuple_GET_SIZE(offsets.ptr()) != dims || PyTuple_GET_SIZE(lengths.ptr()) != dims) return {};
  for (py::ssize_t dim = 0; dim < dims; ++dim) {
    const int64_t length = PyLong_AsLongLong(PyTuple_GET_ITEM(lengths.ptr(), dim));
    if (length == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    const int64_t size = row_[kDims + 1 + static_cast<size_t>(dim)];
    if (dim == 0 ? length >= size : length != size) return {};
  }
  PyObject* const begin = PyTuple_GET_ITEM(offsets.ptr(), 0);
  const py::object end = checked(PyNumber_Add(begin, PyTuple_GET_ITEM(lengths.ptr(), 0)));
  const py::object rows = checked(PySlice_New(begin, end.ptr(), nullptr));
  return checked(PyObject_GetItem(tensor, rows.ptr()));
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
