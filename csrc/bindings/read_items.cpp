#include "bindings/read_items.h"

#include <algorithm>
#include <cstdint>

#include "bindings/python.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using metadata::Columns;
using metadata::Entry;
using planning::Box;
using planning::Boxes;

// torch.Sizes of one kind. Those of neighbours are often equal, and then one object.
class Sizes {
 public:
  explicit Sizes(const py::type& type) : type_(type) {}

  const py::object& of(const int64_t* numbers, size_t count) {
    if (!last_ || !std::equal(numbers, numbers + count, numbers_.begin(), numbers_.end())) {
      numbers_.assign(numbers, numbers + count);
      last_ = type_(to_python(numbers, count));
    }
    return last_;
  }

  const py::object& zeros(size_t count) {
    zeros_.resize(count, 0);
    return of(zeros_.data(), count);
  }

 private:
  const py::type& type_;
  py::object last_;
  std::vector<int64_t> numbers_;
  std::vector<int64_t> zeros_;
};

// An instance of a frozen dataclass, made without its __init__, which takes most of the time of a plan: it writes each
// field by a call of object.__setattr__.
class Instance {
 public:
  explicit Instance(const py::type& type) {
    auto* const python_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    const py::tuple no_arguments;
    object_ = py::reinterpret_steal<py::object>(PyBaseObject_Type.tp_new(python_type, no_arguments.ptr(), nullptr));
    if (!object_) throw py::error_already_set();
  }

  Instance& set(py::handle name, py::handle value) {
    if (PyObject_GenericSetAttr(object_.ptr(), name.ptr(), value.ptr()) != 0) throw py::error_already_set();
    return *this;
  }

  const py::object& object() const { return object_; }

 private:
  py::object object_;
};

// Names of fields, which are never freed.
struct ItemNames {
  py::handle type = PyUnicode_InternFromString("type");
  py::handle dest_index = PyUnicode_InternFromString("dest_index");
  py::handle dest_offsets = PyUnicode_InternFromString("dest_offsets");
  py::handle storage_index = PyUnicode_InternFromString("storage_index");
  py::handle storage_offsets = PyUnicode_InternFromString("storage_offsets");
  py::handle lengths = PyUnicode_InternFromString("lengths");
  py::handle fqn = PyUnicode_InternFromString("fqn");
  py::handle offset = PyUnicode_InternFromString("offset");
  py::handle index = PyUnicode_InternFromString("index");
  py::handle offsets = PyUnicode_InternFromString("offsets");  // of a chunk
};

}  // namespace

py::list make_read_items(const Columns& columns, const Boxes& boxes, const std::vector<size_t>& indices,
                         const py::list& fqns, const py::list& wanted, const ReadItemTypes& types) {
  static const ItemNames names;
  Sizes zero_offsets(types.size);
  Sizes chunk_offsets(types.size);
  Sizes destination_offsets(types.size);
  Sizes storage_offsets(types.size);
  Sizes lengths(types.size);
  py::list items(indices.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    const Box& box = boxes.boxes.at(indices[i]);
    const Entry& entry = columns.entries[boxes.entries[box.request]];
    const py::object fqn = fqns[box.request];
    const py::object chunks = wanted[box.request];
    py::object offset = zero_offsets.zeros(box.dims);
    if (!chunks.is_none()) {
      offset = py::reinterpret_borrow<py::sequence>(chunks)[box.wanted].attr(names.offsets);
      if (!py::type::handle_of(offset).is(types.size)) offset = types.size(offset);
    }
    // Fields come in the order in which torch sets them.
    const Instance destination = Instance(types.metadata_index)
                                     .set(names.fqn, fqn)
                                     .set(names.index, py::int_(box.wanted))
                                     .set(names.offset, offset);
    const int64_t* const stored = columns.numbers.data() + entry.chunks + 2 * size_t{box.stored} * box.dims;
    const Instance storage = Instance(types.metadata_index)
                                 .set(names.fqn, fqn)
                                 .set(names.index, py::int_(box.stored))
                                 .set(names.offset, chunk_offsets.of(stored, box.dims));
    items[i] = Instance(types.read_item)
                   .set(names.type, types.tensor)
                   .set(names.dest_index, destination.object())
                   .set(names.dest_offsets, destination_offsets.of(boxes.destination_offsets(box), box.dims))
                   .set(names.storage_index, storage.object())
                   .set(names.storage_offsets, storage_offsets.of(boxes.storage_offsets(box), box.dims))
                   .set(names.lengths, lengths.of(boxes.lengths(box), box.dims))
                   .object();
  }
  return items;
}

}  // namespace dcp_fast
