#include "io/buffer.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace dcp_fast::io {

namespace {
constexpr size_t kPage = 4096;
// Below, a large page would mostly hold what belongs to others. Each range may also split a mapping of the process in
// three, and there may only be some tens of thousands of them.
constexpr size_t kWorthwhile = size_t{2} << 20;
}  // namespace

void advise_huge_pages(void* begin, size_t size) {
#ifdef MADV_HUGEPAGE
  if (size < kWorthwhile) return;
  // Rounded outwards: neighbouring allocations then form one range, in which large pages may lie across both.
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + size + kPage - 1) / kPage * kPage;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  static_cast<void>(::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#else
  static_cast<void>(begin), static_cast<void>(size);
#endif
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) ::munmap(data_, capacity_);
}

std::byte* AlignedBuffer::reserve(size_t size) {
  if (size <= capacity_) return data_;
  if (data_ != nullptr) ::munmap(data_, capacity_);
  data_ = nullptr;
  capacity_ = 0;
  const size_t rounded = (size + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
  if (rounded < size) throw std::bad_alloc();
  void* memory = ::mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  advise_huge_pages(memory, rounded);  // page faults cost more than the copy itself
  data_ = static_cast<std::byte*>(memory);
  capacity_ = rounded;
  return data_;
}

}  // namespace dcp_fast::io
