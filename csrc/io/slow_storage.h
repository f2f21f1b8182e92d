// System calls that read as slowly as a benchmark wants: all processes that name the same file share one bandwidth, as
// clients of a file server do, and each request waits for a latency of its own.
//
// The file holds the time until which the bandwidth is taken. A read takes its turn by moving that time on, and returns
// when its turn is over, so that reads come one after another in the order in which they arrive. There is no lock: a
// process that dies leaves nothing behind but turns that it has taken.
//
// To the engine the storage looks like a file system of a network: nobody can tell what is cached, every read counts,
// and there are no mappings.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "io/system_calls.h"

namespace dcp_fast::io {

class SlowStorage final : public SystemCalls {
 public:
  using Clock = std::chrono::steady_clock;  // one clock for all processes of a machine

  // `path`: the file that processes share. It is made where it is missing, and is of no use after the machine has
  // started anew, when clocks begin again. Throws std::invalid_argument, and std::system_error if it cannot be had.
  SlowStorage(const std::string& path, double bytes_per_second, double latency_seconds);
  ~SlowStorage() override;
  SlowStorage(const SlowStorage&) = delete;
  SlowStorage& operator=(const SlowStorage&) = delete;

  ssize_t pread(int fd, void* buffer, size_t size, off_t offset) override;
  ssize_t preadv(int fd, const iovec* vectors, int count, off_t offset) override;
  ssize_t pread_nowait(int fd, void* buffer, size_t size, off_t offset) override;
  int fstatfs(int fd, struct statfs* status) override;
  void* map(int fd, size_t size, off_t offset) override;

  // Waits as a request does that arrived at that time and was given so many bytes.
  void take(int64_t bytes, Clock::time_point arrived = Clock::now());

  // What all processes were given so far.
  int64_t bytes() const { return shared_->bytes.load(std::memory_order_relaxed); }
  int64_t requests() const { return shared_->requests.load(std::memory_order_relaxed); }

 private:
  // A file of zeros is one that nobody has used.
  struct Shared {
    std::atomic<Clock::rep> taken_until;
    std::atomic<int64_t> bytes;
    std::atomic<int64_t> requests;
  };
  static_assert(std::atomic<int64_t>::is_always_lock_free && std::atomic<Clock::rep>::is_always_lock_free);

  ssize_t taken(ssize_t got, Clock::time_point arrived);

  const double bytes_per_second_;
  const Clock::duration latency_;
  Shared* shared_ = nullptr;
};

}  // namespace dcp_fast::io
