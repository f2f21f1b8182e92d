// A part of a file as memory. One thread keeps it from copy to copy: to give pages back, all cores that run threads of
// the process have to be interrupted, which costs as much as copying a quarter of a megabyte.
#pragma once

#include <cstddef>
#include <cstdint>

#include "io/guarded_copy.h"

namespace dcp_fast::io {

class MappedWindow {
 public:
  MappedWindow() = default;
  ~MappedWindow() { reset(); }
  MappedWindow(const MappedWindow&) = delete;
  MappedWindow& operator=(const MappedWindow&) = delete;

  // Shows [offset, offset + size) of a file of `file_size` bytes, and what follows as far as a window goes. It must be
  // reset before it is to show another file. Returns the errno if the system refuses, else 0.
  int show(int fd, int64_t offset, size_t size, int64_t file_size);
  void reset();

  // What is shown, and where in it an offset of the file lies.
  MemoryRange range() const { return range_; }
  const std::byte* at(int64_t offset) const { return range_.begin + (offset - offset_); }

 private:
  MemoryRange range_;
  int64_t offset_ = 0;  // of its begin in the file
};

}  // namespace dcp_fast::io
