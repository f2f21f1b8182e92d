// Where the bytes of a metadata file come from: memory, a file of which only a window is in memory at a time, or blocks
// that arrive one after another. Fresh memory costs more than reading does, so the file and the blocks do not take as
// much memory as they have bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "checkpoint/bytes.h"
#include "io/buffer.h"
#include "io/byte_source.h"

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
  // At least `count` bytes from `position` on, which the source must have. Throws what reading throws, and Unsupported
  // where the source cannot go back so far.
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

  // The file must be open. `interrupted` is asked before every read; if it says so, Interrupted is thrown.
  FileSource(const io::ByteSource& file, std::function<bool()> interrupted, size_t window = kWindow);

  uint64_t size() const override { return static_cast<uint64_t>(file_.size()); }
  Window read(uint64_t position, uint64_t count) override;

 private:
  const io::ByteSource& file_;
  std::function<bool()> interrupted_;
  size_t window_;
  io::AlignedBuffer buffer_;
  io::IoCounters counters_;
};

// Bytes that arrive in blocks, each of them once.
class BlockSource final : public Source {
 public:
  // How far back the parser may go. It goes back by a batch of a list or dict, of which Python writes 1000 items.
  static constexpr size_t kKept = size_t{1} << 20;

  // `next`: the next block, valid until it is called again; empty if no more come, for which the parser gets
  // Unsupported.
  BlockSource(uint64_t size, std::function<checkpoint::Bytes()> next, size_t kept = kKept);

  uint64_t size() const override { return size_; }
  Window read(uint64_t position, uint64_t count) override;

 private:
  uint64_t size_;
  std::function<checkpoint::Bytes()> next_;
  size_t kept_;
  checkpoint::Bytes block_;     // the part not yet copied
  std::vector<uint8_t> bytes_;  // what the parser reads, and some of what it read before
  uint64_t begin_ = 0;          // the position of the first of them
};

}  // namespace dcp_fast::metadata
