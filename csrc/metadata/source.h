// Where the bytes of a metadata file come from: memory, or a file of which only a window is in memory at a time. Fresh
// memory costs more than reading does, so a file is not read into as much memory as it has bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "checkpoint/bytes.h"
#include "io/buffer.h"
#include "io/file.h"

namespace dcp_fast::metadata {

// Bytes that are valid until the next ones are asked for.
struct Window {
  const uint8_t* begin = nullptr;
  const uint8_t* end = nullptr;
};

class Source {
 public:
  virtual ~Source() = default;
  virtual uint64_t size() const = 0;
  // At least `count` bytes from `position` on, which the source must have. Throws what reading throws.
  virtual Window read(uint64_t position, uint64_t count) = 0;
};

class MemorySource final : public Source {
 public:
  explicit MemorySource(checkpoint::Bytes bytes) : bytes_(bytes) {}

  uint64_t size() const override { return bytes_.size(); }
  Window read(uint64_t position, uint64_t count) override;

 private:
  checkpoint::Bytes bytes_;
};

// Reads through the page cache and not by mmap, where a failing disk would be a signal and no error.
class FileSource final : public Source {
 public:
  // Stays within the fastest caches of common machines.
  static constexpr size_t kWindow = size_t{256} << 10;

  // `interrupted` is asked before every read; if it says so, Interrupted is thrown.
  FileSource(const io::File& file, std::function<bool()> interrupted, size_t window = kWindow);

  uint64_t size() const override { return static_cast<uint64_t>(file_.size()); }
  Window read(uint64_t position, uint64_t count) override;

 private:
  const io::File& file_;
  std::function<bool()> interrupted_;
  size_t window_;
  io::AlignedBuffer buffer_;
  io::IoCounters counters_;
};

}  // namespace dcp_fast::metadata
