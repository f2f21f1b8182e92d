// Flattens nested state dicts; see dcp_fast/planning/flatten.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/python.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

void check(int status) {
  if (status < 0) throw py::error_already_set();
}

// State dicts within state dicts are so many at the most; deeper ones are left to torch, whose calls Python counts.
constexpr int kMostLevels = 300;
struct TooDeep {};

// Within a call of a function that calls itself.
class Recursion {
 public:
  Recursion() {
    if (level_ == kMostLevels) throw TooDeep();
    ++level_;
  }
  ~Recursion() { --level_; }
  Recursion(const Recursion&) = delete;
  Recursion& operator=(const Recursion&) = delete;

 private:
  inline static thread_local int level_ = 0;
};

bool is_inert_type(PyTypeObject* type) {
  for (PyTypeObject* inert : {&PyLong_Type, &PyFloat_Type, &PyBool_Type, &PyUnicode_Type, &PyBytes_Type}) {
    if (type == inert) return true;
  }
  return type == Py_TYPE(Py_None);
}

bool is_inert(PyObject* value) {
  if (is_inert_type(Py_TYPE(value))) return true;
  if (!PyTuple_CheckExact(value)) return false;
  for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
    if (!is_inert_type(Py_TYPE(PyTuple_GET_ITEM(value, i)))) return false;
  }
  return true;
}

// A list with copies of the lists in it.
py::list copied(const py::list& values) {
  const Recursion recursion;
  const auto copy =
      py::reinterpret_steal<py::list>(checked(PyList_GetSlice(values.ptr(), 0, PY_SSIZE_T_MAX)).release());
  for (size_t i = 0; i < copy.size(); ++i) {
    if (PyList_CheckExact(PyList_GET_ITEM(copy.ptr(), i))) copy[i] = copied(copy[i]);
  }
  return copy;
}

py::tuple longer(const py::tuple& path, const py::object& last) {
  const auto size = PyTuple_GET_SIZE(path.ptr());
  const auto result = py::reinterpret_steal<py::tuple>(checked(PyTuple_New(size + 1)).release());
  for (py::ssize_t i = 0; i < size; ++i) {
    PyTuple_SET_ITEM(result.ptr(), i, py::handle(PyTuple_GET_ITEM(path.ptr(), i)).inc_ref().ptr());
  }
  PyTuple_SET_ITEM(result.ptr(), size, py::object(last).release().ptr());
  return result;
}

py::str joined(const py::str& first, const py::object& second) {
  return py::reinterpret_steal<py::str>(checked(PyUnicode_Concat(first.ptr(), second.ptr())).release());
}

// What the values of a state dict are to torch.
class Types {
 public:
  Types(const py::tuple& tensors, const py::type& sharded_tensor, const py::type& ordered_dict)
      : tensors_(tensors), sharded_tensor_(sharded_tensor), ordered_dict_(ordered_dict) {}

  bool is_tensor(PyObject* value) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {  // as most values are
      if (is_of(PyTuple_GET_ITEM(tensors_.ptr(), i), value)) return true;
    }
    return false;
  }

  // A tensor among the local shards of a ShardedTensor of plain tensors; nullptr for all else. torch leaves out a
  // ShardedTensor without local shards, and makes another one of a nested one.
  py::object local_tensor(PyObject* value) const {
    if (!is_of(sharded_tensor_.ptr(), value)) return {};
    const py::object shards = checked(PyObject_GetAttr(value, local_shards_.ptr()));
    if (!PyList_CheckExact(shards.ptr()) || PyList_GET_SIZE(shards.ptr()) == 0) return {};
    py::object tensor = checked(PyObject_GetAttr(PyList_GET_ITEM(shards.ptr(), 0), tensor_.ptr()));
    return is_tensor(tensor.ptr()) ? tensor : py::object();
  }

  bool is_dict(PyObject* value) const { return PyDict_CheckExact(value) || is_of(ordered_dict_.ptr(), value); }

 private:
  static bool is_of(PyObject* type, PyObject* value) { return reinterpret_cast<PyObject*>(Py_TYPE(value)) == type; }

  const py::tuple& tensors_;
  const py::type& sharded_tensor_;
  const py::type& ordered_dict_;
  const py::str local_shards_{"_local_shards"};
  const py::str tensor_{"tensor"};
};

class Walk {
 public:
  explicit Walk(const Types& types) : types_(types) {}

  // Whether nothing in it needs torch.
  bool through_dict(const py::object& values, const py::str& prefix, const py::tuple& path) {
    const Recursion recursion;
    if (!PyDict_CheckExact(values.ptr())) {  // it has an order of its own
      for (const py::handle item : values.attr("items")()) {
        const auto pair = py::reinterpret_borrow<py::tuple>(item);
        if (!add_item(values, pair[0], pair[1], prefix, path)) return false;
      }
      return true;
    }
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    for (py::ssize_t position = 0; PyDict_Next(values.ptr(), &position, &key, &value) != 0;) {
      if (!add_item(values, py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value), prefix,
                    path))
        return false;
    }
    return true;
  }

  std::pair<py::dict, py::dict> result() { return {std::move(flat_), std::move(paths_)}; }

 private:
  // May put another value in the place of `value`.
  bool add_item(const py::object& values, const py::object& key, const py::object& value, const py::str& prefix,
                const py::tuple& path) {
    if (!PyUnicode_CheckExact(key.ptr())) return false;
    const py::str fqn = joined(prefix, key);
    if (is_leaf(value.ptr())) return add(fqn, value, longer(path, key));
    if (types_.is_dict(value.ptr())) return through_dict(value, joined(fqn, dot_), longer(path, key));
    if (!PyList_CheckExact(value.ptr())) return false;
    const py::list copy = copied(value);
    check(PyObject_SetItem(values.ptr(), key.ptr(), copy.ptr()));
    return through_list(copy, fqn, longer(path, key));
  }

  bool through_list(const py::list& values, const py::str& fqn, const py::tuple& path) {
    bool all_inert = true;
    for (const py::handle value : values) all_inert = all_inert && is_inert(value.ptr());
    if (all_inert) return add(fqn, values, path);  // no container and no tensor: the list itself is a leaf
    const py::str prefix = joined(fqn, dot_);
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t count = flat_.size();
      const py::object value = values[i];
      const py::int_ index(i);
      const py::str name = joined(prefix, py::str(index));
      const py::tuple way = longer(path, index);
      // A list in a list is a leaf or not by what torch finds in it, and in those around it.
      const bool done = is_leaf(value.ptr())
                            ? add(name, value, way)
                            : types_.is_dict(value.ptr()) && through_dict(value, joined(name, dot_), way);
      // torch puts None in the place of an element that has no leaves, if others follow.
      if (!done || flat_.size() == count) return false;
    }
    return true;
  }

  bool add(const py::str& fqn, const py::object& value, const py::tuple& path) {
    const size_t count = flat_.size();
    if (PyDict_SetDefault(flat_.ptr(), fqn.ptr(), value.ptr()) == nullptr) throw py::error_already_set();
    if (flat_.size() == count) return false;
    check(PyDict_SetItem(paths_.ptr(), fqn.ptr(), path.ptr()));
    return true;
  }

  bool is_leaf(PyObject* value) const {
    if (types_.is_tensor(value)) return is_there(value);
    if (const py::object tensor = types_.local_tensor(value)) return is_there(tensor.ptr());
    return is_inert(value);
  }

  bool is_there(PyObject* tensor) const {
    return !checked(PyObject_GetAttr(tensor, is_meta_.ptr())).is(py::handle(Py_True));
  }

  const Types& types_;
  const py::str dot_{"."};
  const py::str is_meta_{"is_meta"};
  py::dict flat_;
  py::dict paths_;
};

py::object flatten(const py::dict& state_dict, const py::tuple& tensors, const py::type& sharded_tensor,
                   const py::type& ordered_dict) {
  const Types types(tensors, sharded_tensor, ordered_dict);
  Walk walk(types);
  try {
    if (!walk.through_dict(state_dict, py::str(), py::tuple())) return py::none();
  } catch (const TooDeep&) {
    return py::none();
  }
  return py::cast(walk.result());
}

// Finds the names of all dicts and lists.
class Containers {
 public:
  explicit Containers(const Types& types) : types_(types) {}

  // Whether nothing in it needs torch.
  bool through(const py::object& container, const py::str& prefix) {
    const Recursion recursion;
    if (!PyList_CheckExact(container.ptr())) {
      for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(container)) {
        if (!PyUnicode_CheckExact(key.ptr()) || !add(value.ptr(), prefix, key.ptr())) return false;
      }
      return true;
    }
    const auto list = py::reinterpret_borrow<py::list>(container);
    for (size_t i = 0; i < list.size(); ++i) {
      const py::object value = list[i];
      if (!add(value.ptr(), prefix, py::str(py::int_(i)).ptr())) return false;
    }
    return true;
  }

  py::set names() { return std::move(names_); }

 private:
  bool add(PyObject* value, const py::str& prefix, PyObject* key) {
    if (types_.is_tensor(value) || types_.local_tensor(value) || is_inert(value)) return true;
    if (!types_.is_dict(value) && !PyList_CheckExact(value)) return false;
    const py::str name = joined(prefix, py::reinterpret_borrow<py::object>(key));
    names_.add(name);
    return through(py::reinterpret_borrow<py::object>(value), joined(name, dot_));
  }

  const Types& types_;
  const py::str dot_{"."};
  py::set names_;
};

py::object containers(const py::dict& state_dict, const py::tuple& tensors, const py::type& sharded_tensor,
                      const py::type& ordered_dict) {
  const Types types(tensors, sharded_tensor, ordered_dict);
  Containers containers(types);
  try {
    if (!containers.through(state_dict, py::str())) return py::none();
  } catch (const TooDeep&) {
    return py::none();
  }
  return containers.names();
}

}  // namespace

void bind_flatten(py::module_& module) {
  module.def("flatten", &flatten, py::arg("state_dict"), py::arg("tensors"), py::arg("sharded_tensor"),
             py::arg("ordered_dict"), "Leaves by FQN, and their paths; None if torch has to do it.");
  module.def(
      "containers", &containers, py::arg("state_dict"), py::arg("tensors"), py::arg("sharded_tensor"),
      py::arg("ordered_dict"),
      "FQNs of all dicts and lists in a state dict; None if it has values of other types, which torch may know.");
}

}  // namespace dcp_fast
