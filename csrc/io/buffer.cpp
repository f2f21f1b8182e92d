#include "io/buffer.h"

#include <sys/mman.h>

#include <new>

namespace dcp_fast::io {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;

// Up to two pages more, if they make whole huge pages: the system then places the memory so that it consists of them.
// Blocks leave as much for a beginning and an end within a page (Limits).
size_t rounded_up(size_t size) {
  const size_t huge = (size + kHugePage - 1) / kHugePage * kHugePage;
  return huge - size <= 2 * kPageBytes ? huge : (size + kPageBytes - 1) / kPageBytes * kPageBytes;
}
}  // namespace

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) ::munmap(data_, capacity_);
}

std::byte* AlignedBuffer::reserve(size_t size) {
  if (size <= capacity_) return data_;
  if (data_ != nullptr) ::munmap(data_, capacity_);
  data_ = nullptr;
  capacity_ = 0;
  const size_t rounded = rounded_up(size);
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
