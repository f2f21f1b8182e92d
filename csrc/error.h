// The one exception type of the native code. It carries every fact that a person needs to find the bad bytes.
// csrc/bindings/module.cpp hands it to Python, where dcp_fast/errors.py makes a typed exception of it that names the
// FQN.
#pragma once

#include <cerrno>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace dcp_fast {

enum class ErrorKind {
  kIo,               // a system call failed, or memory ran out; `error_number` is its errno
  kTruncated,        // the file ends before the bytes that the metadata promises
  kCorrupt,          // the bytes contradict themselves or the metadata
  kCorruptPickle,    // the description of a tensor within its record contradicts itself
  kCorruptMetadata,  // the metadata of the checkpoint contradicts itself
  kCorruptHeader,    // the header of a safetensors file contradicts itself or the file
  kUnknownDType,     // a tensor is of a dtype that torch does not have
  kSizeMismatch,     // a box does not fit its stored tensor or its destination
  kCuda,             // a call of the CUDA driver failed, or work that it was given
  kCudaOutOfMemory,
  kCudaRefused,  // the driver refuses pinned memory or the kernel, which a load needs; other work on the GPU goes on
};

struct Error : std::runtime_error {
  // `byte_offset` and `byte_length`: the range in the file, -1 where none is known.
  Error(ErrorKind error_kind, const std::string& message, std::string file_path = "", int64_t byte_offset = -1,
        int64_t byte_length = -1)
      : std::runtime_error(message),
        kind(error_kind),
        path(std::move(file_path)),
        offset(byte_offset),
        length(byte_length) {}

  // An error of one CUDA device.
  static Error of_device(int ordinal, ErrorKind error_kind, const std::string& message) {
    Error error(error_kind, message);
    error.device = ordinal;
    return error;
  }

  ErrorKind kind;
  std::string path;
  int64_t offset;
  int64_t length;
  int error_number = 0;
  std::string fqn;      // in UTF-8, "" where none is known or `record` tells
  int64_t record = -1;  // index into the records of the load, -1 where none is known
  int64_t item = -1;    // index into the items of the load, -1 where none is known
  int device = -1;      // ordinal of the CUDA device that refused something, -1 where no single device did
};

// Thrown when the caller has asked to stop (Ctrl-C).
struct Interrupted : std::exception {};

// Calls `work`. If it runs out of memory, that becomes an Error like any other, to which callers add path and range.
template <typename Work>
void with_memory_errors(const Work& work) {
  const auto error = [] {
    Error result(ErrorKind::kIo, "out of memory");
    result.error_number = ENOMEM;
    return result;
  };
  try {
    work();
  } catch (const std::bad_alloc&) {
    throw error();
  } catch (const std::length_error&) {  // a container asked for more than there could ever be
    throw error();
  }
}

}  // namespace dcp_fast
