#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "error.h"
#include "io/system_calls.h"

namespace dcp_fast::io {

namespace {

constexpr int kProbes = 16;
constexpr int kOpenFlags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
constexpr Access kCachedAccess{8 << 10, 4 << 20, 1, false, false};
constexpr Access kMappedAccess{8 << 10, 4 << 20, 1, false, true};

// File systems (`man 2 statfs`) whose page cache is the file as all processes of this machine see it. Those over a
// network may have reasons of their own to throw pages away, and a fault that waits for a server cannot be interrupted.
constexpr std::array<unsigned, 6> kLocalFileSystems = {
    0xEF53,      // ext2, ext3, ext4
    0x58465342,  // xfs
    0x9123683E,  // btrfs
    0xF2F52010,  // f2fs
    0x01021994,  // tmpfs
    0x794C7630,  // overlayfs, which containers see
};

[[noreturn]] void throw_errno(int error_number, const char* what, const std::string& path, int64_t offset,
                              int64_t length) {
  Error error(ErrorKind::kIo, std::string(what) + ": " + std::generic_category().message(error_number), path, offset,
              length);
  error.error_number = error_number;
  throw Error(error);
}

// The kernel's limit on vectors in one call (IOV_MAX).
constexpr size_t kMaxVectors = 1024;

// Makes a system call until no signal interrupts it. Here, and nowhere else, EINTR and short reads are retried.
template <typename Call>
auto retrying(const Call& call) {
  for (;;) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

int open_retrying(const std::string& path, int flags) {
  return retrying([&] { return system_calls().open(path.c_str(), flags); });
}

// Drops the first `bytes` of the vectors that start at `first`, and returns the first that is left.
size_t advance(std::vector<iovec>& vectors, size_t first, size_t bytes) {
  while (first < vectors.size() && bytes >= vectors[first].iov_len) bytes -= vectors[first++].iov_len;
  if (bytes > 0) {
    vectors[first].iov_base = static_cast<char*>(vectors[first].iov_base) + bytes;
    vectors[first].iov_len -= bytes;
  }
  return first;
}

// One system call that reads. Its time begins when the object is made.
class Request {
 public:
  Request(const std::string& path, int64_t offset, size_t size, IoCounters& counters)
      : path_(path), offset_(offset), size_(size), counters_(counters), begin_(trace::Clock::now()) {
    if (counters_.clock != nullptr) counters_.clock->enter(begin_);
  }
  ~Request() {
    if (counters_.clock != nullptr) counters_.clock->leave(begin_, trace::Clock::now());
  }
  Request(const Request&) = delete;
  Request& operator=(const Request&) = delete;

  // Counts the request. `got` is what the call returned; throws the error that it stands for, if any.
  size_t count(ssize_t got) {
    const int error_number = errno;
    counters_.requests.fetch_add(1, std::memory_order_relaxed);
    const int64_t bytes = std::max<int64_t>(got, 0);
    if (trace::Recorder* recorder = counters_.recorder) {
      recorder->add_here("read", recorder->at(begin_), recorder->now(), {bytes, offset_, &path_});
    }
    if (got < 0) throw_errno(error_number, "cannot read", path_, offset_, static_cast<int64_t>(size_));
    if (got == 0) {
      throw Error(ErrorKind::kTruncated, "the file ended while it was read", path_, offset_,
                  static_cast<int64_t>(size_));
    }
    counters_.bytes.fetch_add(bytes, std::memory_order_relaxed);
    return static_cast<size_t>(got);
  }

 private:
  const std::string& path_;
  const int64_t offset_;
  const size_t size_;
  IoCounters& counters_;
  const trace::Clock::time_point begin_;
};

int reason_of(GuardedCopy result) {
  switch (result) {
    case GuardedCopy::kDone:
      return 0;
    case GuardedCopy::kBlocked:
      return kSignalBlocked;
    case GuardedCopy::kTaken:
      return kSignalTaken;
    default:
      return kPagesVanished;
  }
}

}  // namespace

File::File(std::string path, IoMode mode, Readers readers)
    : ByteSource(std::move(path)), mode_(mode), readers_(readers) {
  access_ = kCachedAccess;
}

int64_t File::do_open() {
  // O_NONBLOCK: a pipe in place of a file must be an error, not a hang. It changes nothing for regular files.
  fd_ = open_retrying(path(), kOpenFlags);
  if (fd_ < 0) throw_errno(errno, "cannot open", path(), -1, -1);
  struct stat status{};
  int error_number = 0;
  if (retrying([&] { return system_calls().fstat(fd_, &status); }) != 0) {
    error_number = errno;
  } else if (S_ISDIR(status.st_mode)) {
    error_number = EISDIR;
  } else if (!S_ISREG(status.st_mode)) {
    error_number = EINVAL;
  }
  if (error_number != 0) {
    do_close();
    throw_errno(error_number, "not a readable regular file", path(), -1, -1);
  }
  if (access().whole_pages) open_direct();
  constexpr int64_t kNanoseconds = 1'000'000'000;  // of a second
  version_ = int64_t{status.st_mtim.tv_sec} * kNanoseconds + int64_t{status.st_mtim.tv_nsec};
  return status.st_size;
}

void File::do_close() noexcept {
  // Nothing was written, so a failing close loses nothing.
  if (fd_ >= 0) system_calls().close(std::exchange(fd_, -1));
  if (direct_fd_ >= 0) system_calls().close(std::exchange(direct_fd_, -1));
}

void File::open_direct() {
#ifdef O_DIRECT
  if (direct_fd_ < 0) direct_fd_ = open_retrying(path(), kOpenFlags | O_DIRECT);
#endif
}

Cached File::probe(int64_t begin, int64_t end) const {
  if (end <= begin) return Cached::kUnknown;
  // Without FADV_RANDOM some kernels start reading ahead for a probe that finds nothing, which would then compete
  // with the direct reads. The advice belongs to the descriptor, so the probes get one of their own.
  const int probe_fd = open_retrying(path(), kOpenFlags);
  if (probe_fd < 0) return Cached::kUnknown;
#ifdef POSIX_FADV_RANDOM
  static_cast<void>(::posix_fadvise(probe_fd, 0, 0, POSIX_FADV_RANDOM));
#endif
  const int64_t step = std::max<int64_t>((end - begin) / kProbes, kPageBytes);
  int cached = 0;
  int probes = 0;
  bool can_tell = true;
  for (int64_t position = begin + step / 2; position < end && can_tell; position += step) {
    char byte = 0;
    const ssize_t got = system_calls().pread_nowait(probe_fd, &byte, 1, position);
    ++probes;
    if (got > 0) ++cached;
    if (got < 0 && errno != EAGAIN && errno != EINTR) can_tell = false;
  }
  system_calls().close(probe_fd);
  if (!can_tell) return Cached::kUnknown;
  if (cached == probes) return Cached::kAll;
  return 2 * cached >= probes ? Cached::kMost : Cached::kLittle;
}

bool File::is_local() const {
  struct statfs status{};
  if (retrying([&] { return system_calls().fstatfs(fd_, &status); }) != 0) return false;
  const auto type = static_cast<unsigned>(status.f_type);
  return std::find(kLocalFileSystems.begin(), kLocalFileSystems.end(), type) != kLocalFileSystems.end();
}

void File::choose_access(int64_t begin, int64_t end) {
  const Cached cached = mode_ == IoMode::kAuto ? probe(begin, end) : Cached::kUnknown;
  if (mode_ == IoMode::kMapped || (cached == Cached::kAll && is_local())) {
    access_ = kMappedAccess;
  } else if (readers_ == Readers::kRanksOfNode && cached != Cached::kUnknown && is_local()) {
    access_ = kSharedAccess;
  } else if (mode_ == IoMode::kDirect || cached == Cached::kLittle) {
    open_direct();
    if (direct_fd_ >= 0) access_ = kDirectAccess;
  }
}

void File::read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const {
  check_range(size, offset);
  for (size_t done = 0; done < size;) {
    const int64_t position = offset + static_cast<int64_t>(done);
    Request request(path(), position, size - done, counters);
    const ssize_t got = retrying(
        [&] { return system_calls().pread(fd_, static_cast<char*>(destination) + done, size - done, position); });
    done += request.count(got);
  }
}

void File::read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const {
  size_t size = 0;
  for (const iovec& vector : vectors) size += vector.iov_len;
  check_range(size, offset);
  size_t first = 0;
  for (size_t done = 0; done < size;) {
    const int64_t position = offset + static_cast<int64_t>(done);
    const auto chosen = static_cast<int>(std::min(vectors.size() - first, kMaxVectors));
    Request request(path(), position, size - done, counters);
    const ssize_t got = retrying([&] { return system_calls().preadv(fd_, &vectors[first], chosen, position); });
    const size_t bytes = request.count(got);
    first = advance(vectors, first, bytes);
    done += bytes;
  }
}

void File::read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const {
  if (direct_fd_ < 0) return read_exactly(destination, size, offset, counters);
  check_range(size, offset);
  const size_t lead = static_cast<size_t>(offset) % kPageBytes;
  std::byte* data = destination - lead;
  const int64_t begin = offset - static_cast<int64_t>(lead);
  const size_t span = (lead + size + kPageBytes - 1) / kPageBytes * kPageBytes;
  size_t done = 0;
  // A direct read that stops at an unaligned position (the end of the file, or an odd file system) cannot be continued
  // directly, so the rest is read through the page cache. So is everything if the device refuses the alignment.
  while (done < lead + size && done % kPageBytes == 0) {
    const int64_t position = begin + static_cast<int64_t>(done);
    Request request(path(), position, span - done, counters);
    const ssize_t got = retrying([&] { return system_calls().pread(direct_fd_, data + done, span - done, position); });
    if (got == 0 || (got < 0 && errno == EINVAL)) break;
    done += request.count(got);
  }
  done = std::max(done, lead);
  if (done < lead + size) {
    read_exactly(data + done, lead + size - done, begin + static_cast<int64_t>(done), counters);
  }
}

const std::byte* File::view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const {
  check_range(size, offset);
  const size_t lead = access().whole_pages ? static_cast<size_t>(offset) % kPageBytes : 0;
  std::byte* data = buffer.reserve(lead + size) + lead;
  read_pages(data, size, offset, counters);
  return data;
}

bool File::copy_mapped(const MappedCopy& copy, MappedWindow& window, IoCounters& counters) const {
  if (copy.needed == 0) return false;
  check_range(copy.size, copy.offset);
  Request request(path(), copy.offset, copy.size, counters);
  int reason = window.show(fd_, copy.offset, copy.size, size());
  if (reason == 0) {
    const std::byte* data = window.at(copy.offset);
    reason = reason_of(copy_guarded(window.range(), copy.destination, [&] { copy.copy(data); }));
    // A file that is cut short within a page has zeros there, and no fault. Then its last byte is gone too.
    char last = 0;
    const int64_t end = copy.offset + static_cast<int64_t>(copy.size);
    if (reason == 0 && retrying([&] { return system_calls().pread(fd_, &last, 1, end - 1); }) != 1) {
      reason = kPagesVanished;
    }
  }
  if (reason != 0) {
    if (reason == kPagesVanished) window.reset();
    counters.unmapped.store(reason, std::memory_order_relaxed);
    return false;
  }
  request.count(static_cast<ssize_t>(copy.needed));
  counters.mapped_bytes.fetch_add(static_cast<int64_t>(copy.needed), std::memory_order_relaxed);
  return true;
}

void File::read_ahead(size_t size, int64_t offset) const noexcept {
  // One call brings no more than the device's read-ahead, or its largest request. This is the least that both are by
  // default. What is there already costs a look.
  constexpr int64_t kStep = 128 << 10;
  const int64_t end = std::min(offset + static_cast<int64_t>(size), this->size());
  for (int64_t position = offset; position < end; position += kStep) {
    if (system_calls().read_ahead(fd_, position, static_cast<size_t>(std::min(kStep, end - position))) != 0) return;
  }
}

}  // namespace dcp_fast::io
