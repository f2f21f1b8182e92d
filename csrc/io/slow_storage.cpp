#include "io/slow_storage.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace dcp_fast::io {

namespace {

constexpr double kMostSeconds = 3600;       // of one request
constexpr int kNetworkFileSystem = 0x6969;  // NFS

SlowStorage::Clock::duration duration_of(double seconds) {
  const std::chrono::duration<double> limited(std::min(seconds, kMostSeconds));
  return std::chrono::duration_cast<SlowStorage::Clock::duration>(limited);
}

}  // namespace

SlowStorage::SlowStorage(const std::string& path, double bytes_per_second, double latency_seconds)
    : bytes_per_second_(bytes_per_second), latency_(duration_of(std::max(latency_seconds, 0.0))) {
  if (!(bytes_per_second > 0) || !(latency_seconds >= 0)) {
    throw std::invalid_argument("storage needs a bandwidth above 0, and a latency of 0 or more");
  }
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
  void* memory = MAP_FAILED;
  if (::ftruncate(fd, sizeof(Shared)) == 0) {
    memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  const int error_number = errno;
  ::close(fd);
  if (memory == MAP_FAILED) throw std::system_error(error_number, std::generic_category(), path);
  shared_ = static_cast<Shared*>(memory);
}

SlowStorage::~SlowStorage() { ::munmap(shared_, sizeof(Shared)); }

ssize_t SlowStorage::pread(int fd, void* buffer, size_t size, off_t offset) {
  const auto arrived = Clock::now();
  return taken(SystemCalls::pread(fd, buffer, size, offset), arrived);
}

ssize_t SlowStorage::preadv(int fd, const iovec* vectors, int count, off_t offset) {
  const auto arrived = Clock::now();
  return taken(SystemCalls::preadv(fd, vectors, count, offset), arrived);
}

ssize_t SlowStorage::pread_nowait(int /*fd*/, void* /*buffer*/, size_t /*size*/, off_t /*offset*/) {
  errno = EOPNOTSUPP;
  return -1;
}

int SlowStorage::fstatfs(int fd, struct statfs* status) {
  const int result = SystemCalls::fstatfs(fd, status);
  if (result == 0) status->f_type = kNetworkFileSystem;
  return result;
}

void* SlowStorage::map(int /*fd*/, size_t /*size*/, off_t /*offset*/) {
  errno = ENODEV;
  return MAP_FAILED;
}

// What the machine itself takes for a read is a part of its turn.
ssize_t SlowStorage::taken(ssize_t got, Clock::time_point arrived) {
  if (got < 0) return got;
  take(got, arrived);
  return got;
}

void SlowStorage::take(int64_t bytes, Clock::time_point arrived) {
  const Clock::duration turn = duration_of(static_cast<double>(bytes) / bytes_per_second_);
  Clock::rep taken_until = shared_->taken_until.load();
  Clock::time_point end;
  do {
    end = std::max(Clock::time_point(Clock::duration(taken_until)), arrived) + turn;
  } while (!shared_->taken_until.compare_exchange_weak(taken_until, end.time_since_epoch().count()));
  shared_->bytes.fetch_add(bytes, std::memory_order_relaxed);
  shared_->requests.fetch_add(1, std::memory_order_relaxed);
  std::this_thread::sleep_until(end + latency_);
}

}  // namespace dcp_fast::io
