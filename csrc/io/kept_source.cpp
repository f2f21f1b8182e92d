#include "io/kept_source.h"

#include <algorithm>
#include <utility>

#include "copy/copy.h"

namespace dcp_fast::io {

KeptSource::KeptSource(std::unique_ptr<ByteSource> source, std::vector<KeptRange> ranges,
                       std::shared_ptr<const void> memory)
    : ByteSource(source->path()), source_(std::move(source)), ranges_(std::move(ranges)), memory_(std::move(memory)) {
  access_ = source_->access();
}

void KeptSource::choose_access(int64_t begin, int64_t end) {
  source_->choose_access(begin, end);
  access_ = source_->access();
}

int64_t KeptSource::do_open() {
  source_->open();
  version_ = source_->version();
  return source_->size();
}

void KeptSource::do_close() noexcept { source_->close(); }

const std::byte* KeptSource::find(size_t size, int64_t offset) const {
  const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), offset,
                                      [](int64_t position, const KeptRange& range) { return position < range.begin; });
  if (after == ranges_.begin()) return nullptr;
  const KeptRange& range = *(after - 1);
  if (offset > range.end || size > static_cast<size_t>(range.end - offset)) return nullptr;
  return range.bytes + (offset - range.begin);
}

void KeptSource::read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const {
  const std::byte* kept = find(size, offset);
  if (kept == nullptr) return source_->read_exactly(destination, size, offset, counters);
  copy::copy_bytes(static_cast<std::byte*>(destination), kept, size);
}

void KeptSource::read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const {
  size_t size = 0;
  for (const iovec& vector : vectors) size += vector.iov_len;
  const std::byte* kept = find(size, offset);
  if (kept == nullptr) return source_->read_scattered(vectors, offset, counters);
  for (const iovec& vector : vectors) {
    copy::copy_bytes(static_cast<std::byte*>(vector.iov_base), kept, vector.iov_len);
    kept += vector.iov_len;
  }
}

void KeptSource::read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const {
  const std::byte* kept = find(size, offset);
  if (kept == nullptr) return source_->read_pages(destination, size, offset, counters);
  copy::copy_bytes(destination, kept, size);
}

const std::byte* KeptSource::view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const {
  const std::byte* kept = find(size, offset);
  return kept != nullptr ? kept : source_->view(buffer, size, offset, counters);
}

bool KeptSource::copy_mapped(const MappedCopy& copy, MappedWindow& window, IoCounters& counters) const {
  const std::byte* kept = find(copy.size, copy.offset);
  if (kept == nullptr) return source_->copy_mapped(copy, window, counters);
  copy.copy(kept);
  return true;
}

void KeptSource::read_ahead(size_t size, int64_t offset) const noexcept { source_->read_ahead(size, offset); }

}  // namespace dcp_fast::io
