// Reads of whole ranges into strings, and the errors of reads that fail.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "doctest/doctest.h"
#include "error.h"
#include "io/file.h"

namespace dcp_fast::testing {

// Open for as long as it lives, and asked for all of it.
struct OpenFile : io::File {
  explicit OpenFile(const std::string& path, io::IoMode mode = io::IoMode::kCached) : File(path, mode) {
    open();
    choose_access(0, size());
  }
  ~OpenFile() override { close(); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  bool is_direct() const { return access().whole_pages; }
};

inline std::optional<Error> error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

inline std::string read(const io::File& file, size_t size, int64_t offset) {
  io::IoCounters counters;
  std::string bytes(size, '?');
  file.read_exactly(bytes.data(), size, offset, counters);
  CHECK(counters.bytes == static_cast<int64_t>(size));
  return bytes;
}

inline std::string view(const io::File& file, io::AlignedBuffer& buffer, size_t size, int64_t offset) {
  io::IoCounters counters;
  const std::byte* data = file.view(buffer, size, offset, counters);
  CHECK(counters.bytes >= static_cast<int64_t>(size));
  return std::string(reinterpret_cast<const char*>(data), size);
}

inline void check_errno(const std::string& path, int error_number) {
  const auto error = error_of([&] { const OpenFile file(path); });
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kIo);
  CHECK(error->error_number == error_number);
  CHECK(error->path == path);
}

}  // namespace dcp_fast::testing
