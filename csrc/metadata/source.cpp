#include "metadata/source.h"

#include <algorithm>
#include <utility>

#include "error.h"

namespace dcp_fast::metadata {

Window MemorySource::read(uint64_t position, uint64_t /*count*/) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes_.data());
  return {data + position, data + bytes_.size()};
}

FileSource::FileSource(const io::File& file, std::function<bool()> interrupted, size_t window)
    : file_(file), interrupted_(std::move(interrupted)), window_(window) {}

Window FileSource::read(uint64_t position, uint64_t count) {
  if (interrupted_()) throw Interrupted();
  const auto size = static_cast<size_t>(std::min(std::max<uint64_t>(count, window_), this->size() - position));
  std::byte* data = buffer_.reserve(size);
  file_.read_exactly(data, size, static_cast<int64_t>(position), counters_);
  const auto* begin = reinterpret_cast<const uint8_t*>(data);
  return {begin, begin + size};
}

}  // namespace dcp_fast::metadata
