#include "bindings/requests.h"

#include <algorithm>
#include <utility>

#include "bindings/python.h"
#include "planning/boxes.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using metadata::Columns;
using metadata::Entry;
using metadata::EntryKind;

// Items that are looked at together. A state dict's objects lie all over the memory, and most of the time goes into
// waiting for it: so each is asked for before the one ahead of it is used.
constexpr size_t kGroup = 32;
// Combinations of placements on one mesh that are told apart. Real jobs have a handful.
constexpr size_t kMostPlacements = 64;

// Names of attributes, which are never freed.
struct Names {
  py::handle spec = PyUnicode_InternFromString("_spec");
  py::handle mesh = PyUnicode_InternFromString("mesh");
  py::handle placements = PyUnicode_InternFromString("placements");
  py::handle shape = PyUnicode_InternFromString("shape");
};

const Names& names() {
  static const Names names;
  return names;
}

bool are_equal(PyObject* a, PyObject* b) {
  if (a == b) return true;
  const auto count = PyTuple_GET_SIZE(a);
  if (PyTuple_GET_SIZE(b) != count) return false;
  for (py::ssize_t i = 0; i < count; ++i) {
    PyObject* first = PyTuple_GET_ITEM(a, i);
    PyObject* second = PyTuple_GET_ITEM(b, i);
    if (first == second) continue;
    if (Py_TYPE(first) != Py_TYPE(second)) return false;
    const int equal = PyObject_RichCompareBool(first, second, Py_EQ);
    if (equal < 0) PyErr_Clear();
    if (equal != 1) return false;
  }
  return true;
}

struct Layout {
  py::object mesh;
  py::object placements;
  explicit operator bool() const { return mesh && placements && PyTuple_CheckExact(placements.ptr()); }
};

Layout layout_of(PyObject* dtensor) {
  const py::object spec = attribute(dtensor, names().spec);  // its attributes are plain, those of the tensor are not
  if (!spec) return {};
  return {attribute(spec.ptr(), names().mesh), attribute(spec.ptr(), names().placements)};
}

}  // namespace

Requests::Requests(std::shared_ptr<const Columns> columns, py::dict made, TensorTypes types, py::tuple placements)
    : columns_(std::move(columns)),
      made_(std::move(made)),
      types_(std::move(types)),
      placements_(std::move(placements)) {}

void Requests::add_all(const py::iterable& items, const py::function& other) {
  std::vector<std::pair<py::object, py::object>> group;
  group.reserve(kGroup);
  auto at = items.begin();
  while (at != items.end()) {
    group.clear();
    for (; group.size() < kGroup && at != items.end(); ++at) {
      const py::tuple pair = py::reinterpret_borrow<py::object>(*at);  // what is no tuple becomes one
      if (pair.size() != 2) throw py::value_error("an item of a state dict is no pair");
      group.emplace_back(pair[0], pair[1]);
      __builtin_prefetch(group.back().first.ptr());
      __builtin_prefetch(group.back().second.ptr());
      __builtin_prefetch(reinterpret_cast<const char*>(group.back().second.ptr()) + 64);
    }
    for (const auto& [fqn, value] : group) fetch_ahead(value.ptr());
    for (const auto& [fqn, value] : group) {
      if (!add_alone(fqn, value)) other(fqn, value);
    }
  }
}

void Requests::fetch_ahead(PyObject* value) const {
  if (!types_.is_dtensor(value)) return;
  __builtin_prefetch(TensorTypes::local_attribute_of(value).ptr());
  __builtin_prefetch(attribute(value, names().spec).ptr());
}

void Requests::add(const py::object& fqn, int64_t entry, const py::list& chunks, const std::vector<int64_t>& values) {
  rows_.insert(rows_.end(), {entry, static_cast<int64_t>(chunks.size())});
  rows_.insert(rows_.end(), values.begin(), values.end());
  fqns_.append(fqn);
  wanted_.append(chunks);
}

void Requests::learn(const py::object& dtensor, const py::list& chunks, const std::vector<int64_t>& values) {
  const Layout layout = layout_of(dtensor.ptr());
  if (!types_.local_of(dtensor.ptr()) || !layout || !take_shape(dtensor.ptr()) ||
      !are_known_placements(layout.placements))
    return;
  Placed* placed = find_placed(layout.mesh, layout.placements);
  if (placed == nullptr) {
    OnMesh& on_mesh = by_mesh_[layout.mesh.ptr()];
    if (on_mesh.size() == kMostPlacements) return;
    on_mesh.push_back({layout.mesh, layout.placements, {}});
    placed = &on_mesh.back();
  }
  Wanted wanted{chunks, {static_cast<int64_t>(chunks.size())}};
  wanted.row.insert(wanted.row.end(), values.begin(), values.end());
  placed->by_shape.insert_or_assign(shape_, std::move(wanted));
}

bool Requests::add_alone(const py::object& fqn, const py::object& value) {
  const bool is_dtensor = types_.is_dtensor(value.ptr());
  if (!PyUnicode_CheckExact(fqn.ptr()) || !(is_dtensor || types_.is_whole_type(value.ptr()))) return false;
  // Asks the dict itself: its class makes what is not there.
  if (PyDict_GET_SIZE(made_.ptr()) != 0 && PyDict_Contains(made_.ptr(), fqn.ptr()) != 0) return false;
  const uint32_t number = columns_->fqns.find(Utf8(fqn).view(), next_);
  next_ = number + 1;  // as state dicts are often saved and loaded in the same order
  if (number >= columns_->entries.size() || columns_->entries[number].kind != EntryKind::kTensor) return false;
  return is_dtensor ? add_like_before(fqn, value, number) : add_whole(fqn, value, number);
}

bool Requests::add_whole(const py::object& fqn, const py::object& value, uint32_t number) {
  if (!has_no_attributes(value.ptr()) || !take_shape(value.ptr()) || !has_size(number)) return false;
  rows_.insert(rows_.end(), {int64_t{number}, planning::kWhole});
  fqns_.append(fqn);
  wanted_.append(py::none());
  return true;
}

bool Requests::add_like_before(const py::object& fqn, const py::object& value, uint32_t number) {
  if (!types_.local_of(value.ptr())) return false;
  const Layout layout = layout_of(value.ptr());
  if (!layout) return false;
  const Placed* placed = find_placed(layout.mesh, layout.placements);
  if (placed == nullptr || !take_shape(value.ptr()) || !has_size(number)) return false;
  const auto known = placed->by_shape.find(shape_);
  if (known == placed->by_shape.end()) return false;
  const Wanted& wanted = known->second;
  if (wanted.chunks.empty()) return true;  // of this one the rank holds nothing
  rows_.push_back(number);
  rows_.insert(rows_.end(), wanted.row.begin(), wanted.row.end());
  fqns_.append(fqn);
  wanted_.append(wanted.chunks);
  return true;
}

bool Requests::take_shape(PyObject* tensor) {
  const py::object shape = attribute(tensor, names().shape);
  if (!shape || !PyTuple_Check(shape.ptr())) return false;
  const auto dims = PyTuple_GET_SIZE(shape.ptr());
  shape_.clear();
  for (py::ssize_t dim = 0; dim < dims; ++dim) {
    PyObject* size = PyTuple_GET_ITEM(shape.ptr(), dim);
    if (!PyLong_CheckExact(size)) return false;  // a symbol
    shape_.push_back(PyLong_AsLongLong(size));   // torch keeps no longer ones
  }
  return true;
}

bool Requests::has_size(uint32_t number) const {
  const Entry& entry = columns_->entries[number];
  const int64_t* size = columns_->numbers.data() + entry.size;
  return shape_.size() == entry.dims && std::equal(shape_.begin(), shape_.end(), size);
}

Requests::Placed* Requests::find_placed(const py::object& mesh, const py::object& placements) {
  const auto on_mesh = by_mesh_.find(mesh.ptr());
  if (on_mesh == by_mesh_.end()) return nullptr;
  for (Placed& placed : on_mesh->second) {
    if (are_equal(placed.placements.ptr(), placements.ptr())) return &placed;
  }
  return nullptr;
}

bool Requests::are_known_placements(const py::object& placements) const {
  for (const py::handle placement : py::reinterpret_borrow<py::tuple>(placements)) {
    if (!contains(placements_, reinterpret_cast<PyObject*>(Py_TYPE(placement.ptr())))) return false;
  }
  return true;
}

}  // namespace dcp_fast
