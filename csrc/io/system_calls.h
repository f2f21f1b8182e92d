// The one seam between dcp_fast and the operating system's files. Everything that reads a checkpoint natively goes
// through `system_calls()`, so a test can make the N-th call of any function fail (see fault_injection.h).
#pragma once

#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>

namespace dcp_fast::io {

class SystemCalls {
 public:
  virtual ~SystemCalls() = default;

  // Each behaves as the call that it is named after: -1 and errno on failure.
  virtual int open(const char* path, int flags);
  virtual int fstat(int fd, struct stat* status);
  virtual ssize_t pread(int fd, void* buffer, size_t size, off_t offset);
  virtual ssize_t preadv(int fd, const iovec* vectors, int count, off_t offset);
  // preadv2 with RWF_NOWAIT: EAGAIN if the bytes are not in the page cache, EOPNOTSUPP where nobody can tell.
  virtual ssize_t pread_nowait(int fd, void* buffer, size_t size, off_t offset);
  virtual int close(int fd);
  virtual int fstatfs(int fd, struct statfs* status);
  // mmap of pages that are read and shared with the page cache. ::munmap undoes it, which cannot fail.
  virtual void* map(int fd, size_t size, off_t offset);
  // posix_fadvise with POSIX_FADV_WILLNEED: begins to bring bytes into the page cache. Returns the error.
  virtual int read_ahead(int fd, off_t offset, size_t size);
};

SystemCalls& system_calls();

// Replaces the calls for the whole process until it is called with nullptr. For tests: no load may be under way.
void set_system_calls(SystemCalls* replacement);

}  // namespace dcp_fast::io
