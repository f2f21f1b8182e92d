// Small files in which the system says something about itself.
#pragma once

#include <string>

namespace dcp_fast::io {

// What a file says, up to 64 KiB; nothing if it cannot be read. Not by the standard library's streams: their locales
// crash in a process that has two different standard libraries, and a Python process may.
std::string read_text(const std::string& path);

}  // namespace dcp_fast::io
