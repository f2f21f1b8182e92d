// A byte source of which some ranges are in memory already.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "io/byte_source.h"

namespace dcp_fast::io {

struct KeptRange {
  int64_t begin = 0;
  int64_t end = 0;
  const std::byte* bytes = nullptr;
};

// What lies within kept ranges is taken from memory, and is no request. All else is asked of the source itself.
class KeptSource : public ByteSource {
 public:
  // `ranges` ascend and do not overlap. Their bytes live as long as `memory` does. The source's access is chosen.
  KeptSource(std::unique_ptr<ByteSource> source, std::vector<KeptRange> ranges, std::shared_ptr<const void> memory);

  const void* memory() const { return memory_.get(); }
  // The source itself, which may be taken from this one if nobody has it open.
  std::unique_ptr<ByteSource>& source() { return source_; }

  void be_read_by(Readers readers) override { source_->be_read_by(readers); }
  void choose_access(int64_t begin, int64_t end) override;
  void read_exactly(void* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  void read_scattered(std::vector<iovec>& vectors, int64_t offset, IoCounters& counters) const override;
  void read_pages(std::byte* destination, size_t size, int64_t offset, IoCounters& counters) const override;
  const std::byte* view(AlignedBuffer& buffer, size_t size, int64_t offset, IoCounters& counters) const override;
  bool copy_mapped(const MappedCopy& copy, MappedWindow& window, IoCounters& counters) const override;
  void read_ahead(size_t size, int64_t offset) const noexcept override;

 private:
  int64_t do_open() override;
  void do_close() noexcept override;
  // Where a range lies in memory; null if it does not, or in several places.
  const std::byte* find(size_t size, int64_t offset) const;
  // Whether some of a range lies in memory.
  bool has_some(size_t size, int64_t offset) const;
  // Calls `function(bytes, size, offset)` for the parts of a range in order: with null for those of the source itself.
  template <typename Function>
  void each_part(size_t size, int64_t offset, const Function& function) const;

  std::unique_ptr<ByteSource> source_;
  std::vector<KeptRange> ranges_;
  std::shared_ptr<const void> memory_;
};

}  // namespace dcp_fast::io
