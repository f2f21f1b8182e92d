// System calls that fail when Python's tests want it.

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "bindings/bindings.h"
#include "io/fault_injection.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

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

void bind_faults(py::module_& module) {
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

}  // namespace dcp_fast
