// System calls of which one chosen call fails: how the tests prove that every failure reaches the caller.
#pragma once

#include <atomic>
#include <string>

#include "io/system_calls.h"

namespace dcp_fast::io {

// kPread stands for pread and preadv alike. A short mapping, of kMap, has no pages.
enum class FaultFunction { kOpen, kFstat, kPread, kPreadNowait, kClose, kFstatfs, kMap };

struct Fault {
  FaultFunction function = FaultFunction::kPread;
  int64_t nth = 0;         // the call to hit, counted from 0; -1 hits none and only counts
  int error_number = 0;    // errno of that call; 0 asks for a short read instead
  int64_t repeat = 1;      // how many calls in a row are hit
  size_t short_bytes = 1;  // what a short read returns at the most; 0 looks like the end of the file
};

class FaultySystemCalls final : public SystemCalls {
 public:
  explicit FaultySystemCalls(Fault fault) : fault_(fault) {}

  int open(const char* path, int flags) override;
  int fstat(int fd, struct stat* status) override;
  ssize_t pread(int fd, void* buffer, size_t size, off_t offset) override;
  ssize_t preadv(int fd, const iovec* vectors, int count, off_t offset) override;
  ssize_t pread_nowait(int fd, void* buffer, size_t size, off_t offset) override;
  int close(int fd) override;
  int fstatfs(int fd, struct statfs* status) override;
  void* map(int fd, size_t size, off_t offset) override;

  // Calls of the fault's function so far: a sweep ends when `nth` is past it.
  int64_t calls() const { return calls_.load(); }

 private:
  bool hit(FaultFunction function);

  Fault fault_;
  std::atomic<int64_t> calls_{0};
};

}  // namespace dcp_fast::io
