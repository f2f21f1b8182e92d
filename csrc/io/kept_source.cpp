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
  const std::byte* found = nullptr;
  each_part(size, offset, [&](const std::byte* kept, size_t part, int64_t /*at*/) {
    if (part == size) found = kept;
  });
  return found;
}

template <typename Function>
void KeptSource::each_part(size_t size, int64_t offset, const Function& function) const {
  const int64_t end = offset + static_cast<int64_t>(size);
  auto range = std::partition_point(ranges_.begin(), ranges_.end(),
                                    [offset](const KeptRange& each) { return each.end <= offset; });
  while (offset < end) {
    const bool is_kept = range != ranges_.end() && range->begin <= offset;
    const int64_t next = is_kept ? range->end : range != ranges_.end() ? range->begin : end;
    const int64_t part_end = std::min(next, end);
    function(is_kept ? range->bytes + (offset - range->begin) : nullptr, static_cast<size_t>(part_end - offset),
             offset);
    if (is_kept) ++range;
    offset = part_end;
  }
}

bool KeptSource::has_some(size_t size, int64_t offset) const {
  bool has_some = false;
  each_part(size, offset, [&](const std::byte* kept, size_t, int64_t) { has_some = has_some || kept != nullptr; });
  return has_some;
}

void KeptSource::read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const {
  auto* next = static_cast<std::byte*>(destination);
  each_part(size, offset, [&](const std::byte* kept, size_t part, int64_t at) {
    if (kept != nullptr) {
      copy::copy_bytes(next, kept, part);
    } else {
      source_->read_exactly(next, part, at, counters);
    }
    next += part;
  });
}

void KeptSource::read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const {
  size_t size = 0;
  for (const iovec& vector : vectors) size += vector.iov_len;
  if (!has_some(size, offset)) return source_->read_scattered(vectors, offset, counters);
  for (const iovec& vector : vectors) {
    read_exactly(vector.iov_base, vector.iov_len, offset, counters);
    offset += static_cast<int64_t>(vector.iov_len);
  }
}

void KeptSource::read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const {
  const std::byte* kept = find(size, offset);
  if (kept == nullptr) return source_->read_pages(destination, size, offset, counters);
  copy::copy_bytes(destination, kept, size);
}

const std::byte* KeptSource::view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const {
  if (const std::byte* kept = find(size, offset)) return kept;
  if (!has_some(size, offset)) return source_->view(buffer, size, offset, counters);
  std::byte* data = buffer.reserve(size);
  std::byte* next = data;
  AlignedBuffer others;
  each_part(size, offset, [&](const std::byte* kept, size_t part, int64_t at) {
    copy::copy_bytes(next, kept != nullptr ? kept : source_->view(others, part, at, counters), part);
    next += part;
  });
  return data;
}

bool KeptSource::copy_mapped(const MappedCopy& copy, MappedWindow& window, IoCounters& counters) const {
  if (const std::byte* kept = find(copy.size, copy.offset)) {
    copy.copy(kept);
    return true;
  }
  return !has_some(copy.size, copy.offset) && source_->copy_mapped(copy, window, counters);
}

void KeptSource::read_ahead(size_t size, int64_t offset) const noexcept { source_->read_ahead(size, offset); }

}  // namespace dcp_fast::io
