#include "io/byte_source.h"

#include "error.h"

namespace dcp_fast::io {

void ByteSource::open() {
  const std::scoped_lock lock(mutex_);
  if (users_ == 0) size_ = do_open();
  ++users_;
}

void ByteSource::close() noexcept {
  const std::scoped_lock lock(mutex_);
  if (--users_ == 0) do_close();
}

void ByteSource::check_range(size_t size, int64_t offset) const {
  if (offset >= 0 && offset <= size_ && size <= static_cast<uint64_t>(size_ - offset)) return;
  throw Error(ErrorKind::kTruncated, "the file is only " + std::to_string(size_) + " bytes long", path_, offset,
              static_cast<int64_t>(size));
}

}  // namespace dcp_fast::io
