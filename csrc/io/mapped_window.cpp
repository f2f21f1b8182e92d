#include "io/mapped_window.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "io/system_calls.h"

namespace dcp_fast::io {

namespace {

// Windows begin and end at multiples of this, so that the system can map a large page where the page cache has one. One
// fault then does for 512 pages.
constexpr int64_t kUnit = 2 << 20;

// The pages of a window that were touched count as resident memory of the process, though they are the page cache's.
constexpr int64_t kWindow = 32 << 20;

int64_t round_up(int64_t offset) { return (offset + kUnit - 1) / kUnit * kUnit; }

}  // namespace

int MappedWindow::show(int fd, int64_t offset, size_t size, int64_t file_size) {
  const int64_t end = offset + static_cast<int64_t>(size);
  if (range_.begin != nullptr && offset >= offset_ && end - offset_ <= range_.end - range_.begin) return 0;
  reset();
  offset_ = offset / kUnit * kUnit;
  const int64_t bytes = round_up(std::max(end, std::min(offset_ + kWindow, file_size))) - offset_;
  const void* memory = system_calls().map(fd, static_cast<size_t>(bytes), offset_);
  if (memory == MAP_FAILED) return errno;
  range_.begin = static_cast<const std::byte*>(memory);
  range_.end = range_.begin + bytes;
  return 0;
}

void MappedWindow::reset() {
  if (range_.begin == nullptr) return;
  ::munmap(const_cast<std::byte*>(range_.begin), static_cast<size_t>(range_.end - range_.begin));
  range_ = {};
}

}  // namespace dcp_fast::io
