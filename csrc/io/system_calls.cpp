#include "io/system_calls.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace dcp_fast::io {

int SystemCalls::open(const char* path, int flags) { return ::open(path, flags); }

int SystemCalls::fstat(int fd, struct stat* status) { return ::fstat(fd, status); }

ssize_t SystemCalls::pread(int fd, void* buffer, size_t size, off_t offset) {
  return ::pread(fd, buffer, size, offset);
}

ssize_t SystemCalls::preadv(int fd, const iovec* vectors, int count, off_t offset) {
  return ::preadv(fd, vectors, count, offset);
}

ssize_t SystemCalls::pread_nowait(int fd, void* buffer, size_t size, off_t offset) {
#ifdef RWF_NOWAIT
  const iovec vector{buffer, size};
  return ::preadv2(fd, &vector, 1, offset, RWF_NOWAIT);
#else
  static_cast<void>(fd), static_cast<void>(buffer), static_cast<void>(size), static_cast<void>(offset);
  errno = EOPNOTSUPP;
  return -1;
#endif
}

int SystemCalls::close(int fd) { return ::close(fd); }

int SystemCalls::fstatfs(int fd, struct statfs* status) { return ::fstatfs(fd, status); }

void* SystemCalls::map(int fd, size_t size, off_t offset) {
  return ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, offset);
}

int SystemCalls::read_ahead(int fd, off_t offset, size_t size) {
#ifdef POSIX_FADV_WILLNEED
  return ::posix_fadvise(fd, offset, static_cast<off_t>(size), POSIX_FADV_WILLNEED);
#else
  static_cast<void>(fd), static_cast<void>(offset), static_cast<void>(size);
  return EOPNOTSUPP;
#endif
}

namespace {
SystemCalls real_calls;
std::atomic<SystemCalls*> current_calls{&real_calls};
}  // namespace

SystemCalls& system_calls() { return *current_calls.load(std::memory_order_acquire); }

void set_system_calls(SystemCalls* replacement) {
  current_calls.store(replacement != nullptr ? replacement : &real_calls, std::memory_order_release);
}

}  // namespace dcp_fast::io
