#include "io/byte_source.h"

#include <algorithm>
#include <system_error>

#include "error.h"

namespace dcp_fast::io {

std::string why_unmapped(int reason) {
  switch (reason) {
    case 0:
      return "";
    case kSignalBlocked:
      return "SIGBUS is blocked in the thread that loads";
    case kSignalTaken:
      return "another library took over SIGBUS during a load";
    case kPagesVanished:
      return "a mapped file changed or could not be read";
    case kSmallBlocks:
      return "blocks of less than 256 KiB are read";
    default:
      return "a file could not be mapped: " + std::generic_category().message(reason);
  }
}

void ByteSource::open() {
  const std::scoped_lock lock(mutex_);
  if (users_ == 0) size_ = do_open();
  ++users_;
}

void ByteSource::close() noexcept {
  const std::scoped_lock lock(mutex_);
  if (--users_ == 0) do_close();
}

bool ByteSource::copy_mapped(const MappedCopy& /*copy*/, MappedWindow& /*window*/, IoCounters& /*counters*/) const {
  return false;
}

void ByteSource::read_ahead(size_t /*size*/, int64_t /*offset*/) const noexcept {}

Access access_of(const ByteSources& sources) {
  Access all;
  for (const auto& source : sources) {
    all.block_bytes = std::max(all.block_bytes, source->access().block_bytes);
    all.requests_at_once = std::max(all.requests_at_once, source->access().requests_at_once);
    all.shared = all.shared || source->access().shared;
  }
  return all;
}

void ByteSource::check_range(size_t size, int64_t offset) const {
  if (offset >= 0 && offset <= size_ && size <= static_cast<uint64_t>(size_ - offset)) return;
  throw Error(ErrorKind::kTruncated, "the file is only " + std::to_string(size_) + " bytes long", path_, offset,
              static_cast<int64_t>(size));
}

}  // namespace dcp_fast::io
