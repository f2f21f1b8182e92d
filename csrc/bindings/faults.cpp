// System calls that fail when Python's tests want it, and storage that is as slow as a benchmark wants.

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "io/fault_injection.h"
#include "io/slow_storage.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

// System calls that are installed while they are entered.
class Installed {
 public:
  Installed() = default;
  ~Installed() { leave(); }
  Installed(const Installed&) = delete;
  Installed& operator=(const Installed&) = delete;

  void enter(io::SystemCalls& calls) {
    io::set_system_calls(&calls);
    entered_ = true;
  }
  void leave() {
    if (entered_) io::set_system_calls(nullptr);
    entered_ = false;
  }

 private:
  bool entered_ = false;
};

// Installs faults while it is entered: `with FaultInjection("pread", nth=3, error_number=errno.EIO):`.
class FaultInjection {
 public:
  FaultInjection(const std::string& function, int64_t nth, int error_number, int64_t repeat, size_t short_bytes) {
    static const std::map<std::string, io::FaultFunction> functions = {
        {"open", io::FaultFunction::kOpen},   {"fstat", io::FaultFunction::kFstat},
        {"pread", io::FaultFunction::kPread}, {"pread_nowait", io::FaultFunction::kPreadNowait},
        {"close", io::FaultFunction::kClose}, {"fstatfs", io::FaultFunction::kFstatfs},
        {"map", io::FaultFunction::kMap},
    };
    const auto found = functions.find(function);
    if (found == functions.end()) throw py::value_error("no such function: " + function);
    calls_ = std::make_unique<io::FaultySystemCalls>(io::Fault{found->second, nth, error_number, repeat, short_bytes});
  }

  void enter() { installed_.enter(*calls_); }
  void leave() { installed_.leave(); }
  int64_t calls() const { return calls_->calls(); }

 private:
  std::unique_ptr<io::FaultySystemCalls> calls_;
  Installed installed_;
};

// Reads of this process come from slow storage while it is entered.
class SlowStorage {
 public:
  SlowStorage(const py::str& path, double bytes_per_second, double latency_seconds)
      : calls_(system_path(path), bytes_per_second, latency_seconds) {}

  void enter() { installed_.enter(calls_); }
  void leave() { installed_.leave(); }
  void take(int64_t bytes) {
    if (bytes < 0) throw py::value_error("a negative number of bytes");
    const py::gil_scoped_release release;
    calls_.take(bytes);
  }
  int64_t bytes() const { return calls_.bytes(); }
  int64_t requests() const { return calls_.requests(); }

 private:
  io::SlowStorage calls_;
  Installed installed_;
};

template <typename Class>
void bind_as_context(py::class_<Class>& bound) {
  bound
      .def(
          "__enter__",
          [](Class& context) -> Class& {
            context.enter();
            return context;
          },
          py::return_value_policy::reference)
      .def("__exit__", [](Class& context, const py::args&) { context.leave(); });
}

}  // namespace

void bind_faults(py::module_& module) {
  py::class_<FaultInjection> faults(module, "FaultInjection");
  faults
      .def(py::init<const std::string&, int64_t, int, int64_t, size_t>(), py::arg("function"), py::arg("nth"),
           py::arg("error_number") = 0, py::arg("repeat") = 1, py::arg("short_bytes") = 1)
      .def_property_readonly("calls", &FaultInjection::calls);
  bind_as_context(faults);

  py::class_<SlowStorage> storage(
      module, "SlowStorage",
      "Storage that is as slow as a benchmark wants. While it is entered, native reads of this process wait for one "
      "bandwidth together with those of all processes that name the same file, and each for a latency of its own. It "
      "looks like a file system of a network: there are no mappings, and nobody can tell what is cached.");
  storage
      .def(py::init<const py::str&, double, double>(), py::arg("path"), py::kw_only(), py::arg("bytes_per_second"),
           py::arg("latency_seconds") = 0.0)
      .def("take", &SlowStorage::take, py::arg("bytes"),
           "Waits as a request for so many bytes does: for loaders that read in another way.")
      .def_property_readonly("bytes", &SlowStorage::bytes, "What all processes were given so far.")
      .def_property_readonly("requests", &SlowStorage::requests, "How many requests of all processes brought them.");
  bind_as_context(storage);
}

}  // namespace dcp_fast
