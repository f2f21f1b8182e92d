// This file and its neighbours bindings_*.cpp alone know Python: turns columns of integers into the native structures
// and native errors into exceptions.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings_metadata.h"
#include "bindings_planning.h"
#include "checkpoint/dtype.h"
#include "cuda/staging.h"
#include "error.h"
#include "io/fault_injection.h"
#include "trace/recorder.h"
#include "transfer/engine.h"
#include "transfer/layouts.h"
#include "transfer/options.h"
#include "transfer/program.h"
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
using transfer::Transfer;

// Walks a Python buffer of int64 with bounds checks.
class Column {
 public:
  explicit Column(const py::buffer& buffer) : info_(buffer.request()) {
    if (info_.ndim != 1 || info_.itemsize != sizeof(int64_t) ||
        (info_.size > 1 && info_.strides[0] != sizeof(int64_t))) {
      throw py::value_error("expected a contiguous buffer of 64-bit integers");
    }
  }
  bool done() const { return position_ == info_.size; }
  int64_t next() {
    if (done()) throw py::value_error("the column ends within a row");
    return static_cast<const int64_t*>(info_.ptr)[position_++];
  }
  size_t next_index(size_t bound) {
    const int64_t value = next();
    if (value < 0 || static_cast<size_t>(value) >= bound) throw py::index_error("index out of range in a column");
    return static_cast<size_t>(value);
  }
  std::vector<int64_t> next(size_t count) {
    if (count > static_cast<size_t>(info_.size - position_)) throw py::value_error("the column ends within a row");
    const auto* begin = static_cast<const int64_t*>(info_.ptr) + position_;
    position_ += static_cast<py::ssize_t>(count);
    return {begin, begin + count};
  }
  size_t next_dims() {
    constexpr size_t kMaxDims = 64 + 1;  // torch's own limit is 64
    return next_index(kMaxDims);
  }

 private:
  py::buffer_info info_;
  py::ssize_t position_ = 0;
};

const char* kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kIo:
      return "io";
    case ErrorKind::kTruncated:
      return "truncated";
    case ErrorKind::kCorrupt:
      return "corrupt";
    case ErrorKind::kCorruptPickle:
      return "corrupt_pickle";
    case ErrorKind::kCorruptMetadata:
      return "corrupt_metadata";
    case ErrorKind::kSizeMismatch:
      return "size_mismatch";
    case ErrorKind::kCuda:
      return "cuda";
    case ErrorKind::kCudaOutOfMemory:
      return "cuda_out_of_memory";
  }
  return "corrupt";
}

// True if a signal handler raised (Ctrl-C): its exception is then pending.
bool interrupted() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <typename Function>
auto without_gil(const Function& function) {
  try {
    const py::gil_scoped_release release;
    return function();
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

// A path as Python's os functions pass it to the system: any bytes but NUL.
std::string system_path(const py::str& path) {
  PyObject* encoded = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw py::error_already_set();  // ValueError for a NUL
  return py::reinterpret_steal<py::bytes>(encoded);
}

Layouts read_layouts(const std::vector<py::str>& python_paths, const py::buffer& record_column,
                     const Options& options) {
  std::vector<std::string> paths;
  paths.reserve(python_paths.size());
  for (const py::str& path : python_paths) paths.push_back(system_path(path));
  Column column(record_column);
  std::vector<Record> records;
  while (!column.done()) {
    Record record;
    record.file = column.next_index(paths.size());
    record.offset = column.next();
    record.length = column.next();
    record.opaque = column.next() != 0;
    records.push_back(record);
  }
  return without_gil(
      [&] { return transfer::read_layouts(std::move(paths), std::move(records), options, interrupted); });
}

std::unique_ptr<Program> make_program(const Layouts& layouts, const py::buffer& item_column,
                                      const py::buffer& destination_column) {
  std::vector<Destination> destinations;
  Column rows(destination_column);
  while (!rows.done()) {
    Destination destination;
    destination.data = reinterpret_cast<std::byte*>(rows.next());  // NOLINT(performance-no-int-to-ptr)
    const int64_t device = rows.next();
    if (device < transfer::kElsewhere || device > std::numeric_limits<int>::max())
      throw py::index_error("no such device");
    destination.device = static_cast<int>(device);
    const int64_t dtype = rows.next();
    if (dtype < checkpoint::kUnknownDType || dtype >= static_cast<int64_t>(checkpoint::kDTypes.size())) {
      throw py::index_error("no such dtype");
    }
    destination.dtype = static_cast<checkpoint::DType>(dtype);
    const size_t dims = rows.next_dims();
    destination.sizes = rows.next(dims);
    destination.strides = rows.next(dims);
    destinations.push_back(std::move(destination));
  }
  std::vector<Item> items;
  Column column(item_column);
  while (!column.done()) {
    Item item;
    item.record = column.next_index(layouts.records.size());
    item.destination = column.next_index(destinations.size());
    const size_t dims = column.next_dims();
    item.storage_offsets = column.next(dims);
    item.destination_offsets = column.next(dims);
    item.lengths = column.next(dims);
    items.push_back(std::move(item));
  }
  return std::make_unique<Program>(layouts, std::move(items), destinations);
}

std::vector<size_t> items_of(const Program& program, Transfer::Kind kind, int32_t wave) {
  std::vector<size_t> indices;
  for (const size_t i : program.items_of(wave)) {
    if (program.transfers()[i].kind == kind) indices.push_back(i);
  }
  return indices;
}

py::tuple read_range(const py::str& python_path, int64_t offset, int64_t length, const Options& options) {
  const std::string path = system_path(python_path);
  if (offset < 0 || length < 0) throw py::value_error("negative offset or length");
  const io::File file = [&path] {
    const py::gil_scoped_release release;
    return io::File(path);
  }();
  if (offset > file.size() || length > file.size() - offset) {
    throw Error(ErrorKind::kTruncated, "the file is only " + std::to_string(file.size()) + " bytes long", path, offset,
                length);
  }
  const auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, length));
  if (!bytes) throw py::error_already_set();  // MemoryError
  char* data = PyBytes_AS_STRING(bytes.ptr());
  // In blocks, so that Ctrl-C need not wait for all of a large entry.
  constexpr int64_t kBlock = 256 << 10;
  const auto blocks = static_cast<size_t>((length + kBlock - 1) / kBlock);
  io::IoCounters counters = options.counters();
  without_gil([&] {
    transfer::run_parallel(blocks, 1, counters, interrupted, [&](size_t block, const transfer::Worker&) {
      const int64_t begin = static_cast<int64_t>(block) * kBlock;
      const auto size = static_cast<size_t>(std::min(kBlock, length - begin));
      file.read_exactly(data + begin, size, offset + begin, counters);
    });
    return 0;
  });
  return py::make_tuple(bytes, counters.requests.load());
}

using StreamsByDevice = std::map<int, uint64_t>;  // torch's current streams, as handles

std::map<int, cuda::StreamHandle> stream_handles(const StreamsByDevice& streams) {
  std::map<int, cuda::StreamHandle> handles;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  for (const auto& [device, stream] : streams) handles[device] = reinterpret_cast<cuda::StreamHandle>(stream);
  return handles;
}

void synchronize(cuda::Staging& staging, const StreamsByDevice& streams) {
  without_gil([&] {
    staging.synchronize(stream_handles(streams), interrupted);
    return 0;
  });
}

// What holds GPU memory waits for the GPU before it goes. In a child of the process that made it nothing of the driver
// may be called: the child's copy is left as it is.
struct DeleteStaging {
  pid_t owner = ::getpid();

  void operator()(cuda::Staging* staging) const {
    if (::getpid() != owner) return;
    const py::gil_scoped_release release;
    delete staging;
  }
};

double seconds(io::ReadClock::Duration duration) { return std::chrono::duration<double>(duration).count(); }

// Without a track, the event goes to that of the calling thread.
void add_event(trace::Recorder& recorder, const std::optional<std::string>& track, const std::string& name,
               int64_t begin, int64_t end, std::optional<int64_t> bytes) {
  const trace::Track chosen = track ? recorder.track(*track) : recorder.thread_track();
  trace::Arguments arguments;
  arguments.bytes = bytes.value_or(trace::kNone);
  recorder.add(chosen, recorder.keep(name), begin, end, arguments);
}

py::list events_of(const trace::Recorder& recorder) {
  const auto optional = [](int64_t value) { return value == trace::kNone ? py::object(py::none()) : py::int_(value); };
  const std::vector<trace::Event> events = recorder.events();
  const std::vector<std::string> tracks = recorder.tracks();
  py::list result;
  for (const trace::Event& event : events) {
    const trace::Arguments& arguments = event.arguments;
    py::object path = py::none();
    if (arguments.path != nullptr) {
      path = py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefault(arguments.path->c_str()));
    }
    result.append(py::make_tuple(tracks[event.track], event.name, event.begin, event.end, optional(arguments.bytes),
                                 path, optional(arguments.offset)));
  }
  return result;
}

// Installs faults while it is entered: `with FaultInjection("pread", nth=3, error_number=errno.EIO):`.
class FaultInjection {
 public:
  FaultInjection(const std::string& function, int64_t nth, int error_number, int64_t repeat, size_t short_bytes) {
    io::Fault fault;
    if (function == "open") {
      fault.function = io::FaultFunction::kOpen;
    } else if (function == "fstat") {
      fault.function = io::FaultFunction::kFstat;
    } else if (function == "pread") {
      fault.function = io::FaultFunction::kPread;
    } else if (function == "pread_nowait") {
      fault.function = io::FaultFunction::kPreadNowait;
    } else if (function == "close") {
      fault.function = io::FaultFunction::kClose;
    } else {
      throw py::value_error("no such function: " + function);
    }
    fault.nth = nth;
    fault.error_number = error_number;
    fault.repeat = repeat;
    fault.short_bytes = short_bytes;
    calls_ = std::make_unique<io::FaultySystemCalls>(fault);
  }
  ~FaultInjection() { leave(); }
  FaultInjection(const FaultInjection&) = delete;
  FaultInjection& operator=(const FaultInjection&) = delete;

  void enter() {
    io::set_system_calls(calls_.get());
    entered_ = true;
  }
  void leave() {
    if (entered_) io::set_system_calls(nullptr);
    entered_ = false;
  }
  int64_t calls() const { return calls_->calls(); }

 private:
  std::unique_ptr<io::FaultySystemCalls> calls_;
  bool entered_ = false;
};

}  // namespace
}  // namespace dcp_fast

PYBIND11_MODULE(_native, module) {
  using namespace dcp_fast;  // NOLINT(google-build-using-namespace)
  module.doc() = "Native engine of dcp_fast: finds payloads in checkpoint files and places boxes of them in memory.";

  // args: kind, message, errno, record, item, path, offset, length; -1 and "" where unknown.
  static py::handle native_error = py::exception<Error>(module, "NativeError").release();
  py::register_exception_translator(
      [](std::exception_ptr pointer) {  // NOLINT(performance-unnecessary-value-param): pybind11's signature
        try {
          if (pointer) std::rethrow_exception(pointer);
        } catch (const Error& error) {
          const py::tuple arguments =
              py::make_tuple(kind_name(error.kind), error.what(), error.error_number, error.record, error.item,
                             py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefault(error.path.c_str())),
                             error.offset, error.length);
          PyErr_SetObject(native_error.ptr(), arguments.ptr());
        }
      });

  py::list names;
  for (const checkpoint::DTypeInfo& dtype : checkpoint::kDTypes) names.append(std::string(dtype.name));
  module.attr("DTYPES") = py::tuple(names);

  py::enum_<io::IoMode>(module, "IoMode")
      .value("AUTO", io::IoMode::kAuto)
      .value("CACHED", io::IoMode::kCached)
      .value("DIRECT", io::IoMode::kDirect);

  py::class_<trace::Recorder, std::shared_ptr<trace::Recorder>>(module, "TraceRecorder")
      .def(py::init<>())
      .def("now", &trace::Recorder::now, "Nanoseconds since the recorder was made.")
      .def("add", &add_event, py::arg("track"), py::arg("name"), py::arg("begin"), py::arg("end"),
           py::arg("bytes") = py::none())
      .def("events", &events_of, "Tuples of track, name, begin, end, bytes, path, offset; None where unknown.");

  py::class_<Options>(module, "Options")
      .def(py::init([](int threads, int64_t block_bytes, int64_t staging_bytes, io::IoMode mode,
                       std::shared_ptr<trace::Recorder> recorder) {
             Options options{threads, block_bytes, staging_bytes, mode, {}, {}};
             options.read_clock = std::make_shared<io::ReadClock>();
             options.recorder = std::move(recorder);
             return options;
           }),
           py::kw_only(), py::arg("threads"), py::arg("block_bytes"), py::arg("staging_bytes"), py::arg("mode"),
           py::arg("recorder") = nullptr)
      .def_readonly("block_bytes", &Options::block_bytes)
      .def_readonly("recorder", &Options::recorder)
      .def_property_readonly("reading_seconds",
                             [](const Options& options) { return seconds(options.read_clock->reading()); })
      .def_property_readonly("waiting_seconds",
                             [](const Options& options) { return seconds(options.read_clock->waiting()); })
      .def("with_threads", [](Options options, int threads) {
        options.threads = threads;
        return options;
      });

  py::class_<Layouts>(module, "Layouts")
      .def_readonly("requests", &Layouts::requests)
      .def_readonly("bytes_read", &Layouts::bytes)
      .def_readonly("modes", &Layouts::modes)
      .def("threads", [](const Layouts& layouts,
                         const Options& options) { return transfer::settle(options, layouts.any_direct()).threads; })
      .def("dtype", [](const Layouts& layouts, size_t record) { return layouts.parsed.at(record).layout.dtype; })
      .def("strides", [](const Layouts& layouts, size_t record) { return layouts.parsed.at(record).layout.strides; })
      .def("unknown",
           [](const Layouts& layouts) {
             py::dict reasons;
             for (size_t i = 0; i < layouts.parsed.size(); ++i) {
               if (layouts.parsed[i].status != checkpoint::ParsedRecord::Status::kTensor) {
                 reasons[py::int_(i)] = layouts.parsed[i].reason;
               }
             }
             return reasons;
           })
      .def("__len__", [](const Layouts& layouts) { return layouts.records.size(); });
  module.def("read_layouts", &read_layouts, py::arg("paths"), py::arg("records"), py::arg("options"));

  py::class_<transfer::Stats>(module, "Stats")
      .def_readonly("requests", &transfer::Stats::requests)
      .def_readonly("bytes_read", &transfer::Stats::bytes_read)
      .def_readonly("bytes_placed", &transfer::Stats::bytes_placed);

  py::class_<Program>(module, "Program")
      .def(py::init(&make_program), py::arg("layouts"), py::arg("items"), py::arg("destinations"),
           py::keep_alive<1, 2>())
      .def_property_readonly("waves", &Program::waves)
      .def_property_readonly("bytes_needed", &Program::bytes_needed)
      .def("box",
           [](const Program& program, size_t index) {
             const Item& item = program.items().at(index);
             return py::make_tuple(item.storage_offsets, item.lengths);
           })
      .def("staged",
           [](const Program& program, int32_t wave) { return items_of(program, Transfer::Kind::kStaged, wave); })
      .def("unknown",
           [](const Program& program, int32_t wave) { return items_of(program, Transfer::Kind::kUnknownRecord, wave); })
      .def(
          "run",
          [](const Program& program, int32_t wave, const Options& options, cuda::Staging* staging,
             const StreamsByDevice& streams) {
            const transfer::CudaTargets targets{staging, stream_handles(streams)};
            return without_gil([&] { return transfer::run_wave(program, wave, options, targets, interrupted); });
          },
          py::arg("wave"), py::arg("options"), py::arg("staging") = nullptr, py::arg("streams") = StreamsByDevice());

  py::class_<cuda::DeviceStats>(module, "DeviceStats")
      .def_readonly("bytes_copied", &cuda::DeviceStats::bytes_copied)
      .def_readonly("copies", &cuda::DeviceStats::copies)
      .def_readonly("launches", &cuda::DeviceStats::launches)
      .def_readonly("copy_seconds", &cuda::DeviceStats::copy_seconds);

  py::class_<cuda::Staging, std::unique_ptr<cuda::Staging, DeleteStaging>>(module, "CudaStaging")
      .def(py::init([](int64_t pinned_bytes, int64_t device_bytes, int64_t block_bytes) {
             return std::unique_ptr<cuda::Staging, DeleteStaging>(
                 new cuda::Staging(pinned_bytes, device_bytes, block_bytes));
           }),
           py::kw_only(), py::arg("pinned_bytes"), py::arg("device_bytes"), py::arg("block_bytes"))
      .def_property_readonly("pinned_bytes", &cuda::Staging::pinned_bytes)
      .def_property_readonly("device_bytes", &cuda::Staging::device_bytes)
      .def("synchronize", &synchronize, py::arg("streams"))
      .def("drain", &cuda::Staging::drain, py::call_guard<py::gil_scoped_release>())
      .def("take_stats", &cuda::Staging::take_stats)
      .def("take_slot_seconds", &cuda::Staging::take_slot_seconds);

  module.def("read_range", &read_range, py::arg("path"), py::arg("offset"), py::arg("length"), py::arg("options"),
             "Exactly `length` bytes of a file, and how many requests brought them. Nothing is allocated before the "
             "file's size is checked.");
  bind_metadata(module);
  bind_metadata_stream(module);
  bind_planning(module);

  py::class_<FaultInjection>(module, "FaultInjection")
      .def(py::init<const std::string&, int64_t, int, int64_t, size_t>(), py::arg("function"), py::arg("nth"),
           py::arg("error_number") = 0, py::arg("repeat") = 1, py::arg("short_bytes") = 1)
      .def(
          "__enter__",
          [](FaultInjection& faults) -> FaultInjection& {
            faults.enter();
            return faults;
          },
          py::return_value_policy::reference)
      .def("__exit__", [](FaultInjection& faults, const py::args&) { faults.leave(); })
      .def_property_readonly("calls", &FaultInjection::calls);
}
