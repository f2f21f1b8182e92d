// One checkpoint file, open for reading through the page cache or past it.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/buffer.h"
#include "io/read_clock.h"
#include "trace/recorder.h"

namespace dcp_fast::io {

enum class IoMode {
  kAuto,    // direct for a file that is mostly not in the page cache, else cached
  kCached,  // pread through the page cache
  kDirect,  // O_DIRECT where the file system allows it, else cached
};

// What was asked of the operating system, summed over threads. The clock and the recorder, where there are any, learn
// of every request.
struct IoCounters {
  std::atomic<int64_t> requests{0};
  std::atomic<int64_t> bytes{0};
  ReadClock* clock = nullptr;
  trace::Recorder* recorder = nullptr;
};

class File {
 public:
  // Opens a regular file. Throws Error(kIo) with the path and errno, also for a directory or a pipe.
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }

  // Settles kAuto by probing a few positions in [begin, end) with RWF_NOWAIT; opens the direct descriptor if needed.
  // Returns the mode that reads will use.
  IoMode choose_mode(IoMode wanted, int64_t begin, int64_t end);

  // Throws Error(kTruncated) unless the file has [offset, offset + size).
  void check_range(size_t size, int64_t offset) const;

  // Reads exactly [offset, offset + size) through the page cache. Here, and nowhere else, EINTR and short reads are
  // retried. Throws Error(kTruncated) if the file ends early, Error(kIo) otherwise.
  void read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const;

  // The same for consecutive bytes of the file that go to several places. Uses up `vectors`, none of which is empty.
  void read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const;

  // Reads [offset, offset + size) to `destination`, past the page cache if choose_mode said kDirect. The two have the
  // same position within a page, and the rest of the pages that the destination touches is overwritten. Errors as
  // above.
  void read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const;

  // Reads [offset, offset + size) through `buffer`, past the page cache if choose_mode said kDirect, and returns
  // where the first byte landed. Errors as above.
  const std::byte* read_staged(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const;

 private:
  bool mostly_cached(int64_t begin, int64_t end) const;

  std::string path_;
  int fd_ = -1;
  int direct_fd_ = -1;
  int64_t size_ = 0;
};

}  // namespace dcp_fast::io
