// Layouts and the transfer program for Python.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/column.h"
#include "bindings/file_options.h"
#include "bindings/plain_values.h"
#include "bindings/python.h"
#include "bindings/streams.h"
#include "checkpoint/archive.h"
#include "checkpoint/dtype.h"
#include "checkpoint/value_record.h"
#include "cuda/pinned_ring.h"
#include "error.h"
#include "io/file.h"
#include "metadata/names.h"
#include "trace/recorder.h"
#include "transfer/engine.h"
#include "transfer/layouts.h"
#include "transfer/node.h"
#include "transfer/options.h"
#include "transfer/program.h"
#include "transfer/record_reads.h"
#include "transfer/value_pickles.h"
#include "transfer/workers.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

using transfer::Destination;
using transfer::Item;
using transfer::Layouts;
using transfer::Options;
using transfer::Program;
using transfer::Record;
using transfer::RecordBytes;
using transfer::Transfer;

// A row for each record: its dtype, in codes of metadata, number of dimensions, sizes.
std::vector<checkpoint::TensorLayout> payloads_of(const std::vector<Record>& records, const py::buffer& column,
                                                  const io::ByteSources& sources) {
  std::vector<checkpoint::TensorLayout> payloads;
  payloads.reserve(records.size());
  Column rows(column);
  for (const Record& record : records) {
    checkpoint::TensorLayout layout;
    const size_t code = rows.next_index(metadata::kDTypeNames.size());
    if (code >= checkpoint::kDTypes.size()) {
      Error error(ErrorKind::kUnknownDType, "torch has no dtype " + std::string(metadata::kDTypeNames.at(code)),
                  sources[record.file]->path(), record.offset, record.length);
      error.record = static_cast<int64_t>(payloads.size());
      throw Error(error);
    }
    layout.dtype = static_cast<checkpoint::DType>(code);
    const size_t dims = rows.next_dims();
    layout.sizes = rows.next(dims);
    layout.strides.resize(dims);
    int64_t bytes = checkpoint::info(layout.dtype).itemsize;
    int64_t stride = 1;
    for (size_t dim = dims; dim-- > 0;) {
      const int64_t size = layout.sizes[dim];
      layout.strides[dim] = stride;
      if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes) ||
          __builtin_mul_overflow(stride, std::max<int64_t>(size, 1), &stride)) {
        throw py::value_error("a payload of impossible sizes");
      }
    }
    if (bytes != record.length) throw py::value_error("a payload has another size than its record");
    payloads.push_back(std::move(layout));
  }
  if (!rows.done()) throw py::value_error("there are more payloads than records");
  return payloads;
}

std::unique_ptr<Layouts> open_files(const std::vector<py::str>& python_paths, const py::buffer& record_column,
                                    const FileOptions& options, const std::optional<py::buffer>& payload_column) {
  io::ByteSources sources;
  sources.reserve(python_paths.size());
  for (const py::str& path : python_paths) {
    sources.push_back(std::make_unique<io::File>(system_path(path), options.mode, options.readers));
  }
  Column column(record_column);
  std::vector<Record> records;
  while (!column.done()) {
    Record record;
    record.file = column.next_index(sources.size());
    record.offset = column.next();
    record.length = column.next();
    record.fallback = column.next() != 0;
    records.push_back(record);
  }
  std::vector<checkpoint::TensorLayout> payloads;
  if (payload_column) payloads = payloads_of(records, *payload_column, sources);
  return without_gil([&] {
    return std::make_unique<Layouts>(
        transfer::open_files(std::move(sources), std::move(records), std::move(payloads), options, interrupted));
  });
}

py::tuple read_record(const Layouts& layouts, size_t index, const FileOptions& options) {
  const Record& record = layouts.records.at(index);
  io::ByteSource& source = *layouts.sources[record.file];
  const auto attributed = [&](const auto& work) {
    try {
      return work();
    } catch (Error& error) {
      layouts.attribute(error, index);
      throw;
    }
  };
  const io::OpenSource open = attributed([&] {
    const py::gil_scoped_release release;
    return io::OpenSource(source);
  });
  attributed([&] { source.check_range(static_cast<size_t>(record.length), record.offset); });
  const auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, record.length));
  if (!bytes) throw py::error_already_set();  // MemoryError
  char* data = PyBytes_AS_STRING(bytes.ptr());
  // In blocks, so that Ctrl-C need not wait for all of a large entry.
  constexpr int64_t kBlock = 256 << 10;
  const auto blocks = static_cast<size_t>((record.length + kBlock - 1) / kBlock);
  io::IoCounters counters = options.counters();
  without_gil([&] {
    return attributed([&] {
      transfer::run_parallel(blocks, 1, counters, interrupted, [&](size_t block, const transfer::Worker&) {
        const int64_t begin = static_cast<int64_t>(block) * kBlock;
        const auto size = static_cast<size_t>(std::min(kBlock, record.length - begin));
        source.read_exactly(data + begin, size, record.offset + begin, counters);
      });
      return 0;
    });
  });
  return py::make_tuple(bytes, counters.requests.load(), counters.bytes.load());
}

// The pickles that are in memory at the same time, unless one record has more.
constexpr int64_t kMostPickles = 16 << 20;

py::tuple read_plain_values(const Layouts& layouts, const std::vector<size_t>& records, const FileOptions& options) {
  py::list result(records.size());
  int64_t requests = 0;
  int64_t bytes = 0;
  for (size_t begin = 0; begin < records.size();) {
    size_t end = begin;
    for (int64_t size = 0; end < records.size() && (end == begin || size <= kMostPickles); ++end) {
      size += layouts.records.at(records[end]).length;
    }
    const std::vector<size_t> batch(records.begin() + static_cast<std::ptrdiff_t>(begin),
                                    records.begin() + static_cast<std::ptrdiff_t>(end));
    const transfer::ValuePickles read =
        without_gil([&] { return transfer::read_value_pickles(layouts, batch, options, interrupted); });
    PlainValues values;
    for (size_t i = 0; i < batch.size(); ++i) {
      py::object value;
      if (i % 4096 == 0 && PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!read.pickles[i].empty()) value = values.parse(read.pickles[i]);
      result[begin + i] = value ? value : py::reinterpret_borrow<py::object>(Py_Ellipsis);
    }
    requests += read.requests;
    bytes += read.bytes;
    begin = end;
  }
  return py::make_tuple(result, requests, bytes);
}

transfer::Stats read_records(const Layouts& layouts, const std::vector<size_t>& records, int64_t most_bytes,
                             const FileOptions& options, const std::function<void(size_t, RecordBytes)>& take) {
  if (most_bytes < 0) throw py::value_error("negative limit");
  return without_gil([&] { return transfer::read_records(layouts, records, most_bytes, options, interrupted, take); });
}

py::object find_archive(const py::buffer& record) {
  const py::buffer_info info = record.request();
  const checkpoint::Bytes bytes(static_cast<const std::byte*>(info.ptr),
                                static_cast<size_t>(info.size * info.itemsize));
  const auto archive = checkpoint::find_archive(bytes);
  if (!archive) return py::none();
  py::dict storages;
  for (const auto& storage : archive->storages) {
    storages[to_python(storage.key, "replace")] = py::make_tuple(storage.begin, storage.size);
  }
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(archive->pickle.data()), archive->pickle.size()),
                        storages);
}

py::object parse_plain_value(const py::buffer& record) {
  const py::buffer_info info = record.request();
  const auto size = static_cast<size_t>(info.size * info.itemsize);
  py::object value;
  if (info.size * info.itemsize <= checkpoint::kMaxValueRecord) {
    const auto pickle = checkpoint::find_value_pickle({static_cast<const std::byte*>(info.ptr), size});
    if (pickle) value = PlainValues().parse({reinterpret_cast<const char*>(pickle->data()), pickle->size()});
  }
  return value ? value : py::reinterpret_borrow<py::object>(Py_Ellipsis);
}

double seconds(io::ReadClock::Duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

void bind_transfer(py::module_& module) {
  py::list names;
  for (const checkpoint::DTypeInfo& dtype : checkpoint::kDTypes) names.append(std::string(dtype.name));
  module.attr("DTYPES") = py::tuple(names);

  py::enum_<io::IoMode>(module, "IoMode")
      .value("AUTO", io::IoMode::kAuto)
      .value("CACHED", io::IoMode::kCached)
      .value("DIRECT", io::IoMode::kDirect)
      .value("MAPPED", io::IoMode::kMapped);

  py::class_<FileOptions>(module, "Options")
      .def(py::init([](int threads, int64_t block_bytes, int64_t staging_bytes, io::IoMode mode,
                       std::shared_ptr<trace::Recorder> recorder) {
             const Options options{
                 threads, block_bytes, staging_bytes, true, std::make_shared<io::ReadClock>(), std::move(recorder)};
             return FileOptions{options, mode};
           }),
           py::kw_only(), py::arg("threads"), py::arg("block_bytes"), py::arg("staging_bytes"), py::arg("mode"),
           py::arg("recorder") = nullptr)
      .def_readonly("recorder", &FileOptions::recorder)
      .def_property_readonly("reading_seconds",
                             [](const FileOptions& options) { return seconds(options.read_clock->reading()); })
      .def_property_readonly("waiting_seconds",
                             [](const FileOptions& options) { return seconds(options.read_clock->waiting()); })
      .def(
          "share",
          [](FileOptions options, int parts, int threads, bool mapped) {
            options.staging_bytes /= std::max(parts, 1);
            if (threads > 0) options.threads = threads;
            options.mapped = options.mapped && mapped;
            return options;
          },
          py::arg("parts"), py::kw_only(), py::arg("threads") = 0, py::arg("mapped") = true,
          "The same options for one of several users of the staging memory, with another number of threads if it is "
          "given. Not `mapped`: what is read is used soon, and should stay in the cache.")
      .def(
          "joining",
          [](FileOptions options, int64_t most_gap) {
            if (most_gap < 0) throw py::value_error("a gap of fewer than no bytes");
            options.most_gap = most_gap;
            return options;
          },
          py::arg("most_gap"),
          "The same options where no gap between two ranges is read through that is larger, whatever a request costs.")
      .def(
          "on_node",
          [](FileOptions options, double bytes, double bytes_stored) {
            const transfer::Node node = transfer::node_of_this_process();
            const bool shares = transfer::shares_page_cache(node, bytes, bytes_stored, transfer::room_for_page_cache());
            options.readers = shares ? io::Readers::kRanksOfNode : io::Readers::kThisRank;
            return options;
          },
          py::arg("bytes"), py::arg("bytes_stored"),
          "The same options where ranks of the node leave what they read in the page cache for each other, if they "
          "are better off so. `bytes`: of the records that this rank needs; `bytes_stored`: of all records of the same "
          "tensors.");

  py::class_<Layouts>(module, "Layouts")
      .def_readonly("requests", &Layouts::requests)
      .def_readonly("bytes_read", &Layouts::bytes)
      .def(
          "read_headers",
          [](Layouts& layouts, const FileOptions& options) {
            without_gil([&] {
              transfer::read_headers(layouts, options, interrupted);
              return 0;
            });
          },
          py::arg("options"))
      .def(
          "read_as",
          [](Layouts& layouts, const FileOptions& options) {
            without_gil([&] {
              transfer::be_read_by(layouts, options.readers, options, interrupted);
              return 0;
            });
          },
          py::arg("options"), "As if the files had been opened with these options: see Options.on_node.")
      .def_property_readonly("shared_files", &Layouts::shared_files)
      .def("threads",
           [](const Layouts& layouts, const FileOptions& options) {
             return transfer::limits_of(options, io::access_of(layouts.sources)).threads;
           })
      .def("is_tensor",
           [](const Layouts& layouts, size_t record) {
             return layouts.parsed.at(record).status == checkpoint::ParsedRecord::Status::kTensor;
           })
      .def("fallback_reason", [](const Layouts& layouts, size_t record) { return layouts.parsed.at(record).reason; })
      .def("dtype", [](const Layouts& layouts, size_t record) { return layouts.parsed.at(record).layout.dtype; })
      .def("strides", [](const Layouts& layouts, size_t record) { return layouts.parsed.at(record).layout.strides; })
      .def("__len__", [](const Layouts& layouts) { return layouts.records.size(); });
  module.def("open_files", &open_files, py::arg("paths"), py::arg("records"), py::arg("options"),
             py::arg("payloads") = py::none(), "Layouts whose headers are yet to be read.");

  module.def(
      "ranks_of_node", [] { return transfer::node_of_this_process().ranks; },
      "How many ranks of this machine load at the same time, as far as the launcher tells.");
  module.def(
      "most_reader_threads",
      [](int wanted) { return transfer::reader_threads(wanted, io::kDirectAccess.requests_at_once); },
      py::arg("wanted"), "How many threads read at the most; `wanted` is 0 for the default of this machine.");

  py::class_<RecordBytes>(module, "RecordBytes", py::buffer_protocol(), "The bytes of a record, aligned to 64 bytes.")
      .def_buffer([](const RecordBytes& record) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(record.data.get()), static_cast<py::ssize_t>(record.size));
      });
  module.def(
      "read_records", &read_records, py::arg("layouts"), py::arg("records"), py::arg("most_bytes"), py::arg("options"),
      py::arg("take"),
      "Calls `take` with the index and the bytes of each record, in order, while threads read up to `most_bytes` "
      "of those that come next.");
  module.def(
      "find_archive", &find_archive, py::arg("record"),
      "The pickle of a record, and begin and size of each of its storages; None if it is anything but an archive "
      "as torch.save writes it.");
  module.def("read_plain_values", &read_plain_values, py::arg("layouts"), py::arg("records"), py::arg("options"),
             "The values of bytes entries, with an Ellipsis for each that is more than a plain value, and how many "
             "requests and bytes brought them. Equal values that cannot change are mostly one object.");
  module.def("parse_plain_value", &parse_plain_value, py::arg("record"), "The same of one entry that is in memory.");
  module.def("read_record", &read_record, py::arg("layouts"), py::arg("record"), py::arg("options"),
             "All bytes of a record, and how many requests and bytes brought them. Nothing is allocated before the "
             "file's size is checked.");
}

}  // namespace dcp_fast
