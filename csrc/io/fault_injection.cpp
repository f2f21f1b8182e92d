#include "io/fault_injection.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace dcp_fast::io {

bool FaultySystemCalls::hit(FaultFunction function) {
  if (function != fault_.function) return false;
  const int64_t call = calls_.fetch_add(1);
  return fault_.nth >= 0 && call >= fault_.nth && call < fault_.nth + fault_.repeat;
}

int FaultySystemCalls::open(const char* path, int flags) {
  if (hit(FaultFunction::kOpen) && fault_.error_number != 0) {
    errno = fault_.error_number;
    return -1;
  }
  return SystemCalls::open(path, flags);
}

int FaultySystemCalls::fstat(int fd, struct stat* status) {
  if (hit(FaultFunction::kFstat) && fault_.error_number != 0) {
    errno = fault_.error_number;
    return -1;
  }
  return SystemCalls::fstat(fd, status);
}

ssize_t FaultySystemCalls::pread(int fd, void* buffer, size_t size, off_t offset) {
  if (hit(FaultFunction::kPread)) {
    if (fault_.error_number != 0) {
      errno = fault_.error_number;
      return -1;
    }
    if (fault_.short_bytes == 0) return 0;
    size = std::min(size, fault_.short_bytes);
  }
  return SystemCalls::pread(fd, buffer, size, offset);
}

ssize_t FaultySystemCalls::preadv(int fd, const iovec* vectors, int count, off_t offset) {
  if (hit(FaultFunction::kPread)) {
    if (fault_.error_number != 0) {
      errno = fault_.error_number;
      return -1;
    }
    if (fault_.short_bytes == 0) return 0;
    const iovec first{vectors[0].iov_base, std::min(vectors[0].iov_len, fault_.short_bytes)};
    return SystemCalls::preadv(fd, &first, 1, offset);
  }
  return SystemCalls::preadv(fd, vectors, count, offset);
}

ssize_t FaultySystemCalls::pread_nowait(int fd, void* buffer, size_t size, off_t offset) {
  if (hit(FaultFunction::kPreadNowait) && fault_.error_number != 0) {
    errno = fault_.error_number;
    return -1;
  }
  return SystemCalls::pread_nowait(fd, buffer, size, offset);
}

int FaultySystemCalls::close(int fd) {
  const int result = SystemCalls::close(fd);
  if (hit(FaultFunction::kClose) && fault_.error_number != 0) {
    errno = fault_.error_number;
    return -1;
  }
  return result;
}

int FaultySystemCalls::fstatfs(int fd, struct statfs* status) {
  if (hit(FaultFunction::kFstatfs) && fault_.error_number != 0) {
    errno = fault_.error_number;
    return -1;
  }
  return SystemCalls::fstatfs(fd, status);
}

void* FaultySystemCalls::map(int fd, size_t size, off_t offset) {
  if (!hit(FaultFunction::kMap)) return SystemCalls::map(fd, size, offset);
  if (fault_.error_number != 0) {
    errno = fault_.error_number;
    return MAP_FAILED;
  }
  const int empty = ::memfd_create("empty", MFD_CLOEXEC);
  void* memory = SystemCalls::map(empty, size, 0);
  ::close(empty);
  return memory;
}

}  // namespace dcp_fast::io
