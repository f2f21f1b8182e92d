// Small files of the system, such as those of control groups.
#pragma once

#include <string>

namespace dcp_fast::io {

// Returns the text of a file, up to 64 KiB, or nothing if it cannot be read. It does not use the streams of the
// standard library: their locales crash in a process that has two different standard libraries, as a Python process
// may.
std::string read_text(const std::string& path);

}  // namespace dcp_fast::io
