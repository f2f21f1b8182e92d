// The seam between the engine and what holds the bytes of a checkpoint. Readers, layouts and workers ask a byte source
// for ranges and know nothing else about it; how its bytes come is a matter of the source alone. The local file
// (file.h) is the first one.
//
//   1. open()           anybody may, on any thread; the source stays open until each of them has called close()
//   2. choose_access()  once, when it is known which range will be needed; access() then says how to ask for it
//   3. reads            from any number of threads
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "io/buffer.h"
#include "io/guarded_copy.h"
#include "io/mapped_window.h"
#include "io/read_clock.h"
#include "trace/recorder.h"

namespace dcp_fast::io {

// What was asked of byte sources, summed over threads. The clock and the recorder, where there are any, learn of every
// request.
struct IoCounters {
  std::atomic<int64_t> requests{0};
  std::atomic<int64_t> bytes{0};
  ReadClock* clock = nullptr;
  trace::Recorder* recorder = nullptr;
  std::atomic<int64_t> mapped_bytes{0};  // of `bytes`: copied from memory where the source has them
  std::atomic<int> unmapped{0};          // why some were not, although the access asks for it: see why_unmapped
};

// For IoCounters::unmapped: the errno of a mapping that failed, or one of these.
inline constexpr int kSignalBlocked = -1;
inline constexpr int kSignalTaken = -2;
inline constexpr int kPagesVanished = -3;
inline constexpr int kSmallBlocks = -4;

// The reason in words; empty for 0.
std::string why_unmapped(int reason);

// Who may read a source at the same time.
enum class Readers {
  kThisRank,
  kRanksOfNode,  // what one of them reads should be in the page cache for the others
};

// How a source is best asked.
struct Access {
  // What a request costs beyond its bytes, as the number of bytes that could be read in the same time. Reads are joined
  // across a gap that is cheaper than a request.
  int64_t request_cost = 0;
  // The most that a request should ask for. Larger ones are no faster, and take more memory.
  int64_t block_bytes = 4 << 20;
  // How many requests must be under way at once to keep the source busy. Where it is 1, as many as there are cores.
  int requests_at_once = 1;
  // Only whole pages can be read: view() brings any range through a buffer, and read_pages() a few straight into place.
  bool whole_pages = false;
  // copy_mapped() is faster than reading where it is much.
  bool mapped = false;
  // Other ranks of this machine may read the same bytes at the same time, and each finds in memory what another one has
  // brought there. read_ahead() brings it for all of them.
  bool shared = false;
};

// What is copied from memory where a source has its bytes.
struct MappedCopy {
  int64_t offset = 0;  // the range of the source that is looked at
  size_t size = 0;
  size_t needed = 0;        // how many of its bytes are copied
  MemoryRange destination;  // where they all go
  // Copies them from where the range begins. It obeys the rules of copy_guarded.
  std::function<void(const std::byte*)> copy;
};

class ByteSource {
 public:
  // `path`: what errors and traces call the source.
  explicit ByteSource(std::string path) : path_(std::move(path)) {}
  virtual ~ByteSource() = default;
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;

  const std::string& path() const { return path_; }
  const Access& access() const { return access_; }

  // Throws Error(kIo), and is then not open. Thread-safe, as is close().
  void open();
  void close() noexcept;

  // All that follows needs an open source. The reads are thread-safe.

  int64_t size() const { return size_; }
  // Tells these contents from others of the same size, as far as the source can: for files, when they were written.
  int64_t version() const { return version_; }

  // Before choose_access(), which may then decide otherwise.
  virtual void be_read_by(Readers readers) = 0;
  // Decides how bytes of [begin, end) will be read. Not while anybody reads; it holds when the source is opened again.
  virtual void choose_access(int64_t begin, int64_t end) = 0;

  // Throws Error(kTruncated) unless the source has [offset, offset + size).
  void check_range(size_t size, int64_t offset) const;

  // Reads exactly [offset, offset + size), whatever the access. Throws Error(kTruncated) if the source ends early,
  // Error(kIo) otherwise.
  virtual void read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const = 0;

  // The same for consecutive bytes that go to several places. Uses up `vectors`, none of which is empty.
  virtual void read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const = 0;

  // Reads [offset, offset + size) to `destination`, by whole pages if the access asks for that. The two have the same
  // position within a page, and the rest of the pages that the destination touches may be overwritten. Errors as above.
  virtual void read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const = 0;

  // Returns where [offset, offset + size) lies in memory until `buffer` is used again: in `buffer`, which the source
  // reads it into, or in memory that the source has. Errors as above, and std::bad_alloc.
  virtual const std::byte* view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const = 0;

  // Calls `copy.copy` with memory where the source has the range, in `window`, which no other source uses until it is
  // reset. Returns false if the source has none, or if the range
  // could not be seen to its end: then the destination may hold anything, and the bytes are to be read in another way,
  // which tells what is wrong if that lasts. Throws Error(kTruncated) if the source lacks the range, and
  // std::bad_alloc.
  virtual bool copy_mapped(const MappedCopy& copy, MappedWindow& window, IoCounters& counters) const;

  // Says that [offset, offset + size) will be read soon, by this rank or others. Nothing is lost where that has no use.
  virtual void read_ahead(size_t size, int64_t offset) const noexcept;

 protected:
  // Returns the size. Throws Error(kIo), with nothing left open.
  virtual int64_t do_open() = 0;
  virtual void do_close() noexcept = 0;

  Access access_;
  int64_t version_ = 0;  // set by do_open()

 private:
  const std::string path_;
  std::mutex mutex_;  // for who has it open
  size_t users_ = 0;
  int64_t size_ = 0;
};

// The sources of a load, by the numbers of files. A checkpoint of thousands of files has as many sources, but no more
// of them are open than there are threads that read.
using ByteSources = std::vector<std::unique_ptr<ByteSource>>;

// How all sources together are best asked: as each of them wants at least.
Access access_of(const ByteSources& sources);

// Keeps a source open.
class OpenSource {
 public:
  OpenSource() = default;
  // Throws what ByteSource::open throws.
  explicit OpenSource(ByteSource& source) : source_(&source) { source.open(); }
  ~OpenSource() {
    if (source_ != nullptr) source_->close();
  }
  OpenSource(OpenSource&& other) noexcept : source_(std::exchange(other.source_, nullptr)) {}
  OpenSource& operator=(OpenSource&& other) noexcept {
    std::swap(source_, other.source_);
    return *this;
  }
  OpenSource(const OpenSource&) = delete;
  OpenSource& operator=(const OpenSource&) = delete;

  const ByteSource* get() const { return source_; }

 private:
  ByteSource* source_ = nullptr;
};

}  // namespace dcp_fast::io
