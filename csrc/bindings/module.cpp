// The module _native. Only the files of this folder know Python: they turn columns of integers into native structures,
// and native errors into exceptions.

#include <pybind11/pybind11.h>

#include <exception>

#include "bindings/bindings.h"
#include "bindings/python.h"
#include "error.h"

namespace py = pybind11;

namespace dcp_fast {
namespace {

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
    case ErrorKind::kCorruptHeader:
      return "corrupt_header";
    case ErrorKind::kUnknownDType:
      return "unknown_dtype";
    case ErrorKind::kSizeMismatch:
      return "size_mismatch";
    case ErrorKind::kCuda:
      return "cuda";
    case ErrorKind::kCudaOutOfMemory:
      return "cuda_out_of_memory";
    case ErrorKind::kCudaRefused:
      return "cuda_refused";
  }
  return "corrupt";
}

}  // namespace
}  // namespace dcp_fast

PYBIND11_MODULE(_native, module) {
  using namespace dcp_fast;  // NOLINT(google-build-using-namespace)
  module.doc() = "Native engine of dcp_fast: finds payloads in checkpoint files and places boxes of them in memory.";

  static py::handle native_error = py::exception<Error>(module, "NativeError").release();
  py::register_exception_translator(
      [](std::exception_ptr pointer) {  // NOLINT(performance-unnecessary-value-param): pybind11's signature
        try {
          if (pointer) std::rethrow_exception(pointer);
        } catch (const Error& error) {
          // The facts are attributes, with the names that they have in _native.pyi.
          const py::object raised = native_error(error.what());
          raised.attr("kind") = kind_name(error.kind);
          raised.attr("reason") = error.what();
          raised.attr("error_number") = error.error_number;
          raised.attr("record") = error.record;
          raised.attr("path") = py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefault(error.path.c_str()));
          raised.attr("offset") = error.offset;
          raised.attr("length") = error.length;
          raised.attr("device") = error.device;
          raised.attr("fqn") = to_python(error.fqn);
          PyErr_SetObject(native_error.ptr(), raised.ptr());
        }
      });

  bind_trace(module);
  bind_cuda(module);
  bind_transfer(module);
  bind_program(module);
  bind_destinations(module);
  bind_exchange(module);
  bind_dequantize(module);
  bind_metadata(module);
  bind_elements(module);
  bind_flatten(module);
  bind_planning(module);
  bind_faults(module);
}
