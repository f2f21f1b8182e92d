// The recorder of traces for Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "trace/recorder.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

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

}  // namespace

void bind_trace(py::module_& module) {
  py::class_<trace::Recorder, std::shared_ptr<trace::Recorder>>(module, "TraceRecorder")
      .def(py::init<>())
      .def("now", &trace::Recorder::now, "Nanoseconds since the recorder was made.")
      .def("add", &add_event, py::arg("track"), py::arg("name"), py::arg("begin"), py::arg("end"),
           py::arg("bytes") = py::none())
      .def("events", &events_of, "Tuples of track, name, begin, end, bytes, path, offset; None where unknown.");
}

}  // namespace dcp_fast
