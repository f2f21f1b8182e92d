// One checkpoint file on a file system: read through the page cache or past it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/byte_source.h"

namespace dcp_fast::io {

enum class IoMode {
  kAuto,    // direct for a file that is mostly not in the page cache, else cached
  kCached,  // pread through the page cache
  kDirect,  // O_DIRECT where the file system allows it, else cached
};

// What access() asks for past the page cache, where requests that are under way at once keep a disk busy. Some 32 MiB
// at once do, in requests of 2 MiB or more.
inline constexpr Access kDirectAccess{256 << 10, 16 << 20, 4, true};

class File : public ByteSource {
 public:
  explicit File(std::string path, IoMode mode = IoMode::kCached);

  // Finds out for kAuto, by asking for a few bytes of the range, whether the page cache holds it.
  void choose_access(int64_t begin, int64_t end) override;

  void read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  void read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const override;
  void read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  const std::byte* view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const override;

 private:
  // Opens a regular file, and nothing else: no directory and no pipe.
  int64_t do_open() override;
  void do_close() noexcept override;
  void open_direct();
  bool mostly_cached(int64_t begin, int64_t end) const;

  const IoMode mode_;
  int fd_ = -1;
  int direct_fd_ = -1;
};

}  // namespace dcp_fast::io
