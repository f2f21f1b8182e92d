// The one exception type of the native code. It carries every fact that a person needs to find the bad bytes;
// bindings.cpp hands it to Python, where dcp_fast/errors.py turns it into a typed exception that names the FQN.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace dcp_fast {

enum class ErrorKind {
  kIo,            // a system call failed; `error_number` is its errno
  kTruncated,     // the file ends before the bytes that the metadata promises
  kCorrupt,       // the bytes contradict themselves or the metadata
  kSizeMismatch,  // a box does not fit its stored tensor or its destination
};

struct Error : std::runtime_error {
  Error(ErrorKind error_kind, const std::string& message) : std::runtime_error(message), kind(error_kind) {}

  Error& at(std::string file_path, int64_t begin, int64_t byte_length) {
    path = std::move(file_path);
    offset = begin;
    length = byte_length;
    return *this;
  }

  ErrorKind kind;
  int error_number = 0;
  int64_t record = -1;  // index into the records of the load, -1 where none is known
  int64_t item = -1;    // index into the items of the load, -1 where none is known
  std::string path;
  int64_t offset = -1;  // byte range in the file, -1 where none is known
  int64_t length = -1;
};

}  // namespace dcp_fast
