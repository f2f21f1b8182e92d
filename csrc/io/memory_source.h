// Bytes that are in memory already, such as what other ranks sent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "io/byte_source.h"

namespace dcp_fast::io {

// Reads of it are no requests, and are not counted.
class MemorySource : public ByteSource {
 public:
  // `bytes` must outlive the source.
  MemorySource(std::string path, const std::byte* bytes, size_t size);

  void be_read_by(Readers /*readers*/) override {}
  void choose_access(int64_t begin, int64_t end) override;
  void read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  void read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const override;
  void read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  const std::byte* view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const override;

 private:
  int64_t do_open() override;
  void do_close() noexcept override;

  const std::byte* bytes_;
  const int64_t size_;
};

}  // namespace dcp_fast::io
