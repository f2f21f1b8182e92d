// The metadata of a checkpoint for Python: columns as buffers, and rows as tuples for the objects that Python makes of
// those that are looked at.

#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "error.h"
#include "io/file.h"
#include "metadata/columns.h"
#include "metadata/failure.h"
#include "metadata/names.h"
#include "metadata/parse.h"
#include "metadata/safetensors.h"
#include "metadata/safetensors_columns.h"
#include "metadata/source.h"
#include "transfer/options.h"
#include "transfer/workers.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using metadata::Columns;
using metadata::Entry;
using metadata::EntryKind;
using metadata::HashTable;
using metadata::StorageRows;

// A column, or a part of one, as a buffer that keeps the columns alive.
template <typename T>
struct View {
  std::shared_ptr<const Columns> columns;
  const T* data;
  std::vector<py::ssize_t> shape;
};

template <typename T>
void bind_view(py::module_& module, const char* name) {
  py::class_<View<T>>(module, name, py::buffer_protocol(), py::module_local()).def_buffer([](View<T>& view) {
    std::vector<py::ssize_t> strides(view.shape.size());
    py::ssize_t stride = sizeof(T);
    for (size_t i = strides.size(); i > 0; --i) {
      strides[i - 1] = stride;
      stride *= view.shape[i - 1];
    }
    // pybind11 takes no pointer to constants, whose buffer it then makes read-only.
    return py::buffer_info(const_cast<T*>(view.data), view.shape, strides, true);
  });
}

template <typename T>
py::memoryview view_of(std::shared_ptr<const Columns> columns, const T* data, std::vector<py::ssize_t> shape) {
  return py::memoryview(py::cast(View<T>{std::move(columns), data, std::move(shape)}));
}

template <typename T>
py::memoryview view_of(const std::shared_ptr<Columns>& columns, const std::vector<T>& column) {
  return view_of<T>(columns, column.data(), {static_cast<py::ssize_t>(column.size())});
}

py::list texts(const metadata::TextTable& table, size_t count) {
  py::list result(count);
  for (size_t i = 0; i < count; ++i) result[i] = to_python(table[i]);
  return result;
}

std::vector<size_t> used_dtypes(const Columns& columns) {
  std::array<bool, metadata::kDTypeNames.size()> used{};
  for (const Entry& entry : columns.entries) {
    if (entry.kind == EntryKind::kTensor) used.at(entry.properties.dtype) = true;
  }
  std::vector<size_t> codes;
  for (size_t i = 0; i < used.size(); ++i) {
    if (used.at(i)) codes.push_back(i);
  }
  return codes;
}

const Entry& tensor_entry(const Columns& columns, size_t entry) {
  if (entry >= columns.entries.size()) throw py::index_error("no such entry");
  if (columns.entries[entry].kind != EntryKind::kTensor) throw py::value_error("the entry is no tensor");
  return columns.entries[entry];
}

// None for a bytes entry; dtype, layout, requires_grad, memory format, pin_memory, whether the properties are of the
// class in torch.distributed._shard, size, strides or None.
py::object entry_fields(const Columns& columns, size_t entry) {
  if (entry < columns.entries.size() && columns.entries[entry].kind == EntryKind::kBytes) return py::none();
  const Entry& tensor = tensor_entry(columns, entry);
  const metadata::Properties& properties = tensor.properties;
  py::object strides = py::none();
  if (properties.has_strides) strides = to_python(columns.numbers.data() + properties.strides, properties.stride_count);
  return py::make_tuple(properties.dtype, properties.layout, properties.requires_grad,
                        static_cast<int>(properties.memory_format), properties.pin_memory, properties.of_shard,
                        to_python(columns.numbers.data() + tensor.size, tensor.dims), strides);
}

py::memoryview chunks(const std::shared_ptr<Columns>& columns, size_t entry) {
  const Entry& tensor = tensor_entry(*columns, entry);
  return view_of<int64_t>(columns, columns->numbers.data() + tensor.chunks,
                          {static_cast<py::ssize_t>(tensor.chunk_count), 2, static_cast<py::ssize_t>(tensor.dims)});
}

int64_t found(uint32_t row) { return row == HashTable::kNone ? -1 : int64_t{row}; }

int64_t find_entry(const Columns& columns, const py::str& fqn) {
  const uint32_t index = columns.fqns.find(Utf8(fqn).view());
  return index < columns.entries.size() ? int64_t{index} : -1;
}

// The number of an entry and the size of its tensor, or None for a bytes entry; None if there is no such entry.
py::object find_size(const Columns& columns, const py::str& fqn) {
  const int64_t number = find_entry(columns, fqn);
  if (number < 0) return py::none();
  const Entry& entry = columns.entries[static_cast<size_t>(number)];
  if (entry.kind == EntryKind::kBytes) return py::make_tuple(number, py::none());
  return py::make_tuple(number, to_python(columns.numbers.data() + entry.size, entry.dims));
}

// Whether all keys of state_dict_metadata are keys of a dict.
bool are_keys_of(const Columns& columns, const py::dict& values) {
  if (values.size() < columns.entries.size()) return false;
  size_t found = 0;
  for (const auto& [key, value] : values) {
    if (PyUnicode_CheckExact(key.ptr()) && find_entry(columns, py::reinterpret_borrow<py::str>(key)) >= 0) ++found;
  }
  return found == columns.entries.size();
}

int64_t find_row(const Columns& columns, const py::str& fqn, const std::optional<std::vector<int64_t>>& offset) {
  const uint32_t index = columns.fqns.find(Utf8(fqn).view());
  if (index == metadata::TextTable::kNone) return -1;
  if (!offset) return found(columns.find_row(index, nullptr, StorageRows::kNoOffset));
  if (offset->size() >= StorageRows::kNoOffset) return -1;
  return found(columns.find_row(index, offset->data(), static_cast<uint32_t>(offset->size())));
}

// How many bytes the records of some tensors and values take. Roughly: a damaged file may say anything.
double stored_bytes(const Columns& columns, const std::vector<py::str>& fqns) {
  std::vector<bool> wanted(columns.fqns.size());
  for (const py::str& fqn : fqns) {
    const uint32_t index = columns.fqns.find(Utf8(fqn).view());
    if (index != metadata::TextTable::kNone) wanted[index] = true;
  }
  double bytes = 0;
  const StorageRows& rows = columns.rows;
  for (size_t row = 0; row < rows.size(); ++row) {
    if (wanted[rows.fqn[row]]) bytes += static_cast<double>(rows.length[row]);
  }
  return bytes;
}

int64_t row_of_chunk(const Columns& columns, size_t entry, size_t chunk) {
  const Entry& tensor = tensor_entry(columns, entry);
  if (chunk >= tensor.chunk_count) throw py::index_error("no such chunk");
  const int64_t* offsets = columns.numbers.data() + tensor.chunks + 2 * chunk * tensor.dims;
  return found(columns.find_row(static_cast<uint32_t>(entry), offsets, tensor.dims));
}

// The key: FQN, offset or None, index or None. The value: path, offset, length, transform descriptors or None.
py::tuple row(const Columns& columns, size_t index) {
  const StorageRows& rows = columns.rows;
  if (index >= rows.size()) throw py::index_error("no such row");
  py::object offset = py::none();
  if (rows.dims[index] != StorageRows::kNoOffset) {
    offset = to_python(columns.numbers.data() + rows.chunk_offset[index], rows.dims[index]);
  }
  py::object hint = py::none();
  if (rows.index[index] != StorageRows::kNoIndex) hint = py::int_(rows.index[index]);
  py::object transforms = py::none();
  if (!rows.transforms.empty() && rows.transforms[index] != 0) {
    const metadata::Transforms& known = columns.transforms[rows.transforms[index]];
    py::list names;
    for (const std::string& name : known.names) names.append(to_python(name));
    transforms = known.is_list ? py::object(names) : py::object(py::tuple(names));
  }
  return py::make_tuple(to_python(columns.fqns[rows.fqn[index]]), offset, hint,
                        to_python(columns.files[rows.file[index]]), rows.offset[index], rows.length[index], transforms);
}

// Each: the name, and what it holds as a pickle, or None if only the file has it.
py::list attributes(const Columns& columns) {
  py::list result;
  for (const metadata::Attribute& attribute : columns.attributes) {
    const py::object pickle = attribute.is_read ? py::object(py::bytes(attribute.pickle)) : py::object(py::none());
    result.append(py::make_tuple(to_python(attribute.name), pickle));
  }
  return result;
}

// Each: the module and the name of the class, and the name of the field.
py::list left_out(const Columns& columns) {
  py::list result;
  for (const metadata::LeftOut& field : columns.left_out) {
    result.append(py::make_tuple(to_python(metadata::module_of(field.type)), to_python(metadata::name_of(field.type)),
                                 to_python(field.name)));
  }
  return result;
}

// The columns, or why only Python can read the metadata.
py::object columns_of(metadata::Source& source) {
  auto columns = std::make_shared<Columns>();
  try {
    without_gil([&] { with_memory_errors([&] { *columns = metadata::parse(source); }); });
  } catch (const metadata::Unsupported& reason) {
    return to_python(reason.what(), "backslashreplace");  // it may quote what is no text
  }
  return py::cast(columns);
}

py::object parse_metadata(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  const auto size = static_cast<size_t>(info.size * info.itemsize);
  metadata::MemorySource source({static_cast<const std::byte*>(info.ptr), size});
  return columns_of(source);
}

// `next_block` returns the next bytes as a buffer, which is kept until the next call, and empty if no more come.
py::object parse_blocks(uint64_t size, const py::function& next_block) {
  py::buffer_info block;
  metadata::BlockSource source(size, [&] {
    const py::gil_scoped_acquire gil;
    block = py::buffer(next_block()).request();
    return checkpoint::Bytes(static_cast<const std::byte*>(block.ptr),
                             static_cast<size_t>(block.size * block.itemsize));
  });
  return columns_of(source);
}

py::object read_metadata(const py::str& path) {
  // Other threads may keep the GIL for a while each time.
  constexpr std::chrono::milliseconds kInterval(50);
  auto next = std::chrono::steady_clock::now() + kInterval;
  const auto interrupted_now_and_then = [next, kInterval]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now < next) return false;
    next = now + kInterval;
    return interrupted();
  };
  io::File file(system_path(path));
  const io::OpenSource open(file);
  metadata::FileSource source(file, interrupted_now_and_then);
  return columns_of(source);
}

// Of a safetensors file: the path, the range in it, the dtype and the sizes.
py::tuple payload(const Columns& columns, size_t index) {
  const StorageRows& rows = columns.rows;
  if (index >= rows.dtypes.size()) throw py::index_error("no such payload");
  const uint32_t dims = rows.dims[index];
  return py::make_tuple(to_python(columns.files[rows.file[index]]), rows.offset[index], rows.length[index],
                        rows.dtypes[index], to_python(columns.numbers.data() + rows.chunk_offset[index] + dims, dims));
}

// `indexes`: files that say which of the others holds each tensor. `wanted`: the number of threads, 0 for the default.
std::shared_ptr<Columns> read_safetensors(const std::vector<py::str>& files, const std::vector<py::str>& indexes,
                                          int wanted) {
  std::vector<std::string> names;
  io::ByteSources sources;
  for (const auto* group : {&files, &indexes}) {
    for (const py::str& path : *group) sources.push_back(std::make_unique<io::File>(system_path(path)));
  }
  for (const py::str& path : files) names.emplace_back(Utf8(path).view());
  return without_gil([&] {
    auto columns = std::make_shared<Columns>();
    std::vector<metadata::Header> headers(names.size());
    io::IoCounters counters;
    const int threads = transfer::reader_threads(wanted, io::kDirectAccess.requests_at_once);
    const auto each = [&](size_t begin, size_t end, const auto& read) {
      transfer::run_parallel(end - begin, threads, counters, interrupted, [&](size_t i, transfer::Worker& worker) {
        io::ByteSource& source = *sources[begin + i];
        try {
          with_memory_errors([&] { read(i, worker.open(source)); });
        } catch (Error& error) {
          if (error.path.empty()) error.path = source.path();
          throw;
        }
      });
    };
    each(0, headers.size(),
         [&](size_t i, const io::ByteSource& source) { headers[i] = metadata::read_header(source, counters); });
    each(headers.size(), sources.size(),
         [&](size_t, const io::ByteSource& source) { metadata::check_index(source, headers, names, counters); });
    with_memory_errors([&] { *columns = metadata::collect_headers(headers, names); });
    return columns;
  });
}

template <typename Names>
py::tuple name_tuple(const Names& names) {
  py::tuple result(names.size());
  for (size_t i = 0; i < names.size(); ++i) result[i] = to_python(names[i]);
  return result;
}

}  // namespace

void bind_metadata(py::module_& module) {
  module.attr("METADATA_DTYPES") = name_tuple(metadata::kDTypeNames);
  module.attr("METADATA_LAYOUTS") = name_tuple(metadata::kLayoutNames);
  bind_view<int64_t>(module, "Int64View");
  bind_view<uint32_t>(module, "UInt32View");

  py::class_<Columns, std::shared_ptr<Columns>>(module, "MetadataColumns")
      .def_property_readonly("entry_count", [](const Columns& columns) { return columns.entries.size(); })
      .def_property_readonly("dtypes", &used_dtypes)
      .def("fqns", [](const Columns& columns) { return texts(columns.fqns, columns.entries.size()); })
      .def("find_entry", &find_entry, py::arg("fqn"))
      .def("find_size", &find_size, py::arg("fqn"))
      .def("are_keys_of", &are_keys_of, py::arg("values"))
      .def("entry_fields", &entry_fields, py::arg("entry"))
      .def("chunks", &chunks, py::arg("entry"))
      .def_readonly("has_storage", &Columns::has_storage)
      .def_property_readonly("row_count", [](const Columns& columns) { return columns.rows.size(); })
      .def("find_row", &find_row, py::arg("fqn"), py::arg("offset"))
      .def("row_of_chunk", &row_of_chunk, py::arg("entry"), py::arg("chunk"))
      .def("row", &row, py::arg("index"))
      .def("stored_bytes", &stored_bytes, py::arg("fqns"))
      .def("files", [](const Columns& columns) { return texts(columns.files, columns.files.size()); })
      .def("payload", &payload, py::arg("row"))
      .def_property_readonly("has_payloads", [](const Columns& columns) { return !columns.rows.dtypes.empty(); })
      .def_property_readonly("row_files",
                             [](const std::shared_ptr<Columns>& self) { return view_of(self, self->rows.file); })
      .def_property_readonly("row_offsets",
                             [](const std::shared_ptr<Columns>& self) { return view_of(self, self->rows.offset); })
      .def_property_readonly("row_lengths",
                             [](const std::shared_ptr<Columns>& self) { return view_of(self, self->rows.length); })
      .def_property_readonly("planner_data", [](const Columns& columns) { return py::bytes(columns.planner_data); })
      .def_property_readonly("storage_meta", [](const Columns& columns) { return py::bytes(columns.storage_meta); })
      .def_property_readonly("attributes", &attributes)
      .def_property_readonly("left_out", &left_out)
      .def_property_readonly("version", [](const Columns& columns) {
        return columns.has_version ? py::object(to_python(columns.version)) : py::object(py::none());
      });
  module.def("read_safetensors", &read_safetensors, py::arg("files"), py::arg("indexes"), py::arg("threads"));
  module.def("parse_metadata", &parse_metadata, py::arg("pickle"));
  module.def("parse_blocks", &parse_blocks, py::arg("size"), py::arg("next_block"));
  module.def("read_metadata", &read_metadata, py::arg("path"));
}

}  // namespace dcp_fast
