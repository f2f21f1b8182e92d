#include "io/buffer.h"

#include <sys/mman.h>

#include <new>

namespace dcp_fast::io {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) ::munmap(data_, capacity_);
}

std::byte* AlignedBuffer::reserve(size_t size) {
  if (size <= capacity_) return data_;
  if (data_ != nullptr) ::munmap(data_, capacity_);
  data_ = nullptr;
  capacity_ = 0;
  const size_t rounded = (size + kPageBytes - 1) / kPageBytes * kPageBytes;
  if (rounded < size) throw std::bad_alloc();
  void* memory = ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  // Page faults cost more than the copy itself. If the system refuses huge pages, only speed is lost.
  if (rounded >= kHugePage) static_cast<void>(::madvise(memory, rounded, MADV_HUGEPAGE));
#endif
  data_ = static_cast<std::byte*>(memory);
  capacity_ = rounded;
  return data_;
}

}  // namespace dcp_fast::io
