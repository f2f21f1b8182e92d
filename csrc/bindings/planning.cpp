// Planning for Python: the search for overlaps, and its result as columns for the transfer or as tuples for ReadItems.

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "bindings/read_items.h"
#include "bindings/requests.h"
#include "bindings/rows.h"
#include "box/overlap.h"
#include "planning/boxes.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using metadata::Columns;
using metadata::Entry;
using metadata::StorageRows;
using planning::Box;
using planning::Boxes;
using planning::Records;

struct PlannedBoxes {
  std::shared_ptr<const Columns> columns;
  Boxes boxes;
};

struct PlannedRecords {
  std::shared_ptr<const Columns> columns;
  Records records;
};

PlannedBoxes find_boxes(std::shared_ptr<const Columns> columns, const std::vector<int64_t>& requests) {
  const py::gil_scoped_release release;
  Boxes boxes = planning::find_boxes(*columns, requests);
  return {std::move(columns), std::move(boxes)};
}

PlannedBoxes find_requested(const Requests& requests) {
  const py::gil_scoped_release release;
  return {requests.columns(), planning::find_boxes(*requests.columns(), requests.rows())};
}

// Whether it is a dict whose `get` is that of dict.
bool is_dict(const py::object& object) {
  static const py::handle name = PyUnicode_InternFromString("get");  // is never freed
  if (PyDict_CheckExact(object.ptr())) return true;
  if (!PyDict_Check(object.ptr())) return false;
  const auto get = [](PyTypeObject* type) { return attribute(reinterpret_cast<PyObject*>(type), name); };
  return get(Py_TYPE(object.ptr())).is(get(&PyDict_Type));
}

// The tensor of a state dict that a request goes into, if it is certain which one it is.
py::object destination_of(PyObject* value, bool is_part, uint32_t dims, const TensorTypes& types) {
  static const py::handle name = PyUnicode_InternFromString("ndim");  // is never freed
  py::object tensor = is_part                 ? types.local_of(value)
                      : types.is_whole(value) ? py::reinterpret_borrow<py::object>(value)
                                              : py::object();
  if (!tensor) return {};
  const py::object has = checked(PyObject_GetAttr(tensor.ptr(), name.ptr()));
  return PyLong_AsLongLong(has.ptr()) == dims ? std::move(tensor) : py::object();
}

// The tensors that boxes go into. `other` is called with request, wanted chunk and dimensions for those that it is not
// certain of.
py::list destinations(const PlannedBoxes& planned, const py::list& fqns, const py::list& wanted,
                      const py::object& state_dict, const TensorTypes& types, const py::function& other) {
  const bool can_look = is_dict(state_dict);
  py::list result(planned.boxes.destinations);
  size_t next = 0;
  for (const Box& box : planned.boxes.boxes) {
    if (box.destination != next) continue;
    const py::object fqn = fqns[box.request];
    const bool is_part = !py::object(wanted[box.request]).is_none();
    PyObject* const value = can_look ? PyDict_GetItemWithError(state_dict.ptr(), fqn.ptr()) : nullptr;
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    py::object tensor = value == nullptr ? py::object() : destination_of(value, is_part, box.dims, types);
    result[next++] = tensor ? std::move(tensor) : other(box.request, box.wanted, box.dims);
  }
  return result;
}

// A row for each box, as _native.Program takes them.
Rows item_rows(const PlannedBoxes& planned, const Records& records) {
  const Boxes& boxes = planned.boxes;
  if (records.of_box.size() != boxes.boxes.size()) throw py::value_error("the records are of other boxes");
  Rows rows;
  rows.values.reserve(3 * boxes.boxes.size() + boxes.numbers.size());
  for (size_t i = 0; i < boxes.boxes.size(); ++i) {
    const Box& box = boxes.boxes[i];
    rows.values.insert(rows.values.end(), {records.of_box[i], box.destination, box.dims});
    const int64_t* numbers = boxes.storage_offsets(box);
    rows.values.insert(rows.values.end(), numbers, numbers + 3 * size_t{box.dims});
  }
  return rows;
}

// A row for each record, as open_files takes them.
Rows record_rows(const PlannedRecords& planned, bool all_fallback) {
  const StorageRows& storage = planned.columns->rows;
  Rows rows;
  rows.values.reserve(4 * planned.records.rows.size());
  for (size_t i = 0; i < planned.records.rows.size(); ++i) {
    const uint32_t row = planned.records.rows[i];
    rows.values.insert(rows.values.end(), {planned.records.file[i], storage.offset[row], storage.length[row],
                                           all_fallback || planned.columns->is_transformed(row)});
  }
  return rows;
}

// A row for each record that is a mere payload, as open_files takes them; nothing if records are archives.
std::optional<Rows> payload_rows(const PlannedRecords& planned) {
  const Columns& columns = *planned.columns;
  if (columns.rows.dtypes.empty()) return std::nullopt;
  Rows rows;
  for (const uint32_t row : planned.records.rows) {
    const uint32_t dims = columns.rows.dims[row];
    const int64_t* sizes = columns.numbers.data() + columns.rows.chunk_offset[row] + dims;
    rows.values.insert(rows.values.end(), {columns.rows.dtypes[row], dims});
    rows.values.insert(rows.values.end(), sizes, sizes + dims);
  }
  return rows;
}

// A row for each bytes entry: its file, by the columns' numbers, offset, length, and whether a transform was applied.
Rows bytes_rows(const Columns& columns, const std::vector<py::str>& fqns) {
  Rows rows;
  rows.values.reserve(4 * fqns.size());
  for (const py::str& fqn : fqns) {
    const uint32_t number = columns.fqns.find(Utf8(fqn).view());
    const uint32_t row = number == metadata::TextTable::kNone
                             ? metadata::HashTable::kNone
                             : columns.find_row(number, nullptr, StorageRows::kNoOffset);
    if (row == metadata::HashTable::kNone) {
      PyErr_SetObject(PyExc_KeyError, fqn.ptr());
      throw py::error_already_set();
    }
    const StorageRows& storage = columns.rows;
    rows.values.insert(rows.values.end(),
                       {storage.file[row], storage.offset[row], storage.length[row], columns.is_transformed(row)});
  }
  return rows;
}

py::tuple files(const PlannedRecords& planned) {
  py::list names;
  for (const uint32_t file : planned.records.files) names.append(to_python(planned.columns->files[file]));
  return py::make_tuple(names, planned.records.requests_of_files);
}

box::Chunks make_chunks(std::vector<int64_t> values, size_t dims, size_t count) {
  if (values.size() != 2 * dims * count) throw py::value_error("chunks need offsets and sizes in every dimension");
  return {std::move(values), dims, count};
}

std::vector<int64_t> find_overlaps(size_t dims, std::vector<int64_t> wanted, size_t wanted_count,
                                   std::vector<int64_t> stored, size_t stored_count) {
  return box::find_overlaps(make_chunks(std::move(wanted), dims, wanted_count),
                            make_chunks(std::move(stored), dims, stored_count))
      .rows;
}

}  // namespace

void bind_planning(py::module_& module) {
  py::class_<Rows>(module, "Rows", py::buffer_protocol()).def_buffer([](Rows& rows) {
    return py::buffer_info(rows.values.data(), static_cast<py::ssize_t>(rows.values.size()));
  });
  py::class_<PlannedBoxes>(module, "PlannedBoxes")
      .def("__len__", [](const PlannedBoxes& planned) { return planned.boxes.boxes.size(); })
      .def_property_readonly("uncovered", [](const PlannedBoxes& planned) { return planned.boxes.uncovered; })
      .def_property_readonly("destination_of_box",
                             [](const PlannedBoxes& planned) {
                               std::vector<uint32_t> numbers;
                               numbers.reserve(planned.boxes.boxes.size());
                               for (const Box& box : planned.boxes.boxes) numbers.push_back(box.destination);
                               return numbers;
                             })
      .def(
          "items",
          [](const PlannedBoxes& planned, const std::vector<size_t>& indices, const py::list& fqns,
             const py::list& wanted, py::type read_item, py::type metadata_index, py::type size, py::object tensor) {
            return make_read_items(
                *planned.columns, planned.boxes, indices, fqns, wanted,
                {std::move(read_item), std::move(metadata_index), std::move(size), std::move(tensor)});
          },
          py::arg("indices"), py::arg("fqns"), py::arg("wanted"), py::arg("read_item"), py::arg("metadata_index"),
          py::arg("size"), py::arg("tensor"))
      .def_property_readonly("requests",
                             [](const PlannedBoxes& planned) {
                               std::vector<uint32_t> numbers;
                               numbers.reserve(planned.boxes.boxes.size());
                               for (const Box& box : planned.boxes.boxes) numbers.push_back(box.request);
                               return numbers;
                             })
      .def("destinations", &destinations, py::arg("fqns"), py::arg("wanted"), py::arg("state_dict"), py::arg("types"),
           py::arg("other"))
      .def("find_records",
           [](const PlannedBoxes& planned) {
             return PlannedRecords{planned.columns, planning::find_records(*planned.columns, planned.boxes)};
           })
      .def(
          "rows",
          [](const PlannedBoxes& planned, const PlannedRecords& records) {
            return item_rows(planned, records.records);
          },
          py::arg("records"));
  py::class_<PlannedRecords>(module, "PlannedRecords")
      .def_property_readonly("of_box", [](const PlannedRecords& planned) { return planned.records.of_box; })
      .def_property_readonly("requests", [](const PlannedRecords& planned) { return planned.records.requests; })
      .def_property_readonly("missing", [](const PlannedRecords& planned) { return planned.records.missing; })
      .def_property_readonly("files", &files)
      .def("rows", &record_rows, py::arg("all_fallback"))
      .def("payloads", &payload_rows);
  py::class_<Requests>(module, "Requests")
      .def(py::init<std::shared_ptr<const Columns>, py::dict, TensorTypes, py::tuple>(), py::arg("columns"),
           py::arg("made"), py::arg("types"), py::arg("placements"))
      .def("__len__", [](const Requests& requests) { return requests.fqns().size(); })
      .def_property_readonly("fqns", &Requests::fqns)
      .def_property_readonly("wanted", &Requests::wanted)
      .def("add_all", &Requests::add_all, py::arg("items"), py::arg("other"))
      .def("add", &Requests::add, py::arg("fqn"), py::arg("entry"), py::arg("chunks"), py::arg("values"))
      .def("learn", &Requests::learn, py::arg("dtensor"), py::arg("chunks"), py::arg("values"))
      .def("find_boxes", &find_requested);
  module.def("bytes_rows", &bytes_rows, py::arg("columns"), py::arg("fqns"));
  module.def("find_boxes", &find_boxes, py::arg("columns"), py::arg("requests"),
             "Boxes of all requests: rows of entry, number of wanted chunks, their offsets and sizes; or of entry and "
             "-1.");
  module.def("find_overlaps", &find_overlaps, py::arg("dims"), py::arg("wanted"), py::arg("wanted_count"),
             py::arg("stored"), py::arg("stored_count"),
             "Rows of wanted index, stored index, stored offsets, wanted offsets, lengths; see csrc/box/overlap.h.");
}

}  // namespace dcp_fast
