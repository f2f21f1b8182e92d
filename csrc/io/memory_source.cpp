#include "io/memory_source.h"

#include <utility>

#include "copy/copy.h"

namespace dcp_fast::io {

MemorySource::MemorySource(std::string path, const std::byte* bytes, size_t size)
    : ByteSource(std::move(path)), bytes_(bytes), size_(static_cast<int64_t>(size)) {}

void MemorySource::choose_access(int64_t /*begin*/, int64_t /*end*/) {}

int64_t MemorySource::do_open() { return size_; }

void MemorySource::do_close() noexcept {}

void MemorySource::read_exactly(void* destination, size_t size, int64_t offset, IoCounters& /*counters*/) const {
  check_range(size, offset);
  copy::copy_bytes(static_cast<std::byte*>(destination), bytes_ + offset, size);
}

void MemorySource::read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const {
  for (const iovec& vector : vectors) {
    read_exactly(vector.iov_base, vector.iov_len, offset, counters);
    offset += static_cast<int64_t>(vector.iov_len);
  }
}

void MemorySource::read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const {
  read_exactly(destination, size, offset, counters);
}

const std::byte* MemorySource::view(AlignedBuffer& /*buffer*/, size_t size, int64_t offset,
                                    IoCounters& /*counters*/) const {
  check_range(size, offset);
  return bytes_ + offset;
}

}  // namespace dcp_fast::io
