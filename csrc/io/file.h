// One checkpoint file on a file system: read through the page cache or past it, or mapped into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/byte_source.h"

namespace dcp_fast::io {

enum class IoMode {
  kAuto,    // direct for a file that is mostly not in the page cache; mapped for one that is, on a local file system
  kCached,  // pread through the page cache
  kDirect,  // O_DIRECT where the file system allows it, else cached
  kMapped,  // copied from a mapping where that is faster and the system allows it, else cached
};

// What access() asks for past the page cache, where requests that are under way at once keep a disk busy. Some 32 MiB
// at once do, in requests of 2 MiB or more. The smallest such requests are best: a thread that copies what it has read
// has none under way, and is one of many.
inline constexpr Access kDirectAccess{256 << 10, 2 << 20, 16, true};

// What access() asks for where a file is not in the page cache and other ranks of this machine need it too. They may
// not read it at this moment, so that this rank alone has enough under way.
inline constexpr Access kSharedAccess{8 << 10, 4 << 20, 4, false, true, true};

// How much of a file is in the page cache, as far as one can tell.
enum class Cached { kUnknown, kLittle, kMost, kAll };

class File : public ByteSource {
 public:
  // `readers`: who may read the file at the same time.
  explicit File(std::string path, IoMode mode = IoMode::kCached, Readers readers = Readers::kThisRank);

  void be_read_by(Readers readers) override { readers_ = readers; }
  // Finds out for kAuto, by asking for a few bytes of the range, whether the page cache holds it.
  void choose_access(int64_t begin, int64_t end) override;

  void read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  void read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const override;
  void read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  const std::byte* view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const override;
  bool copy_mapped(const MappedCopy& copy, MappedWindow& window, IoCounters& counters) const override;
  void read_ahead(size_t size, int64_t offset) const noexcept override;

 private:
  // Opens a regular file, and nothing else: no directory and no pipe.
  int64_t do_open() override;
  void do_close() noexcept override;
  void open_direct();
  Cached probe(int64_t begin, int64_t end) const;
  bool is_local() const;

  const IoMode mode_;
  Readers readers_;
  int fd_ = -1;
  int direct_fd_ = -1;
};

}  // namespace dcp_fast::io
