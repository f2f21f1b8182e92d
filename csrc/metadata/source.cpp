#include "metadata/source.h"

#include <algorithm>
#include <utility>

#include "error.h"
#include "metadata/failure.h"

namespace dcp_fast::metadata {

Window MemorySource::read(uint64_t position, uint64_t /*count*/) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes_.data());
  return {data + position, data + bytes_.size()};
}

FileSource::FileSource(const io::ByteSource& file, std::function<bool()> interrupted, size_t window)
    : file_(file), interrupted_(std::move(interrupted)), window_(window) {}

Window FileSource::read(uint64_t position, uint64_t count) {
  if (interrupted_()) throw Interrupted();
  const auto size = static_cast<size_t>(std::min(std::max<uint64_t>(count, window_), this->size() - position));
  std::byte* data = buffer_.reserve(size);
  file_.read_exactly(data, size, static_cast<int64_t>(position), counters_);
  const auto* begin = reinterpret_cast<const uint8_t*>(data);
  return {begin, begin + size};
}

BlockSource::BlockSource(uint64_t size, std::function<checkpoint::Bytes()> next, size_t kept)
    : size_(size), next_(std::move(next)), kept_(kept) {}

Window BlockSource::read(uint64_t position, uint64_t count) {
  if (position < begin_) unsupported("a batch that is longer than what is kept of the blocks");
  const auto before = static_cast<size_t>(position - begin_);
  if (before / 2 > kept_) {
    bytes_.erase(bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(before - kept_));
    begin_ = position - kept_;
  }
  while (begin_ + bytes_.size() < position + count) {
    if (block_.size() == 0) block_ = next_();
    if (block_.size() == 0) unsupported("blocks that end early");
    const size_t size = std::min(block_.size(), FileSource::kWindow);
    const auto* data = reinterpret_cast<const uint8_t*>(block_.data());
    bytes_.insert(bytes_.end(), data, data + size);
    block_ = checkpoint::Bytes(block_.data() + size, block_.size() - size);
  }
  return {bytes_.data() + (position - begin_), bytes_.data() + bytes_.size()};
}

}  // namespace dcp_fast::metadata
