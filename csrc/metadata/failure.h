// The two ways in which metadata is not read.
#pragma once

#include <stdexcept>
#include <string>

#include "error.h"

namespace dcp_fast::metadata {

// The file may be sound, but holds what only the unpickler in Python knows, or refuses by name.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void unsupported(const std::string& reason) { throw Unsupported(reason); }

// No unpickler can make metadata of the file. The caller adds where in the file.
[[noreturn]] inline void corrupt(const std::string& reason) { throw Error(ErrorKind::kCorruptMetadata, reason); }

}  // namespace dcp_fast::metadata
