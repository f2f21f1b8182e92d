#include "copy/populate.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace dcp_fast::copy {

void populate(std::byte* begin, size_t size) noexcept {
  static const auto page_bytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const size_t lead = reinterpret_cast<uintptr_t>(begin) % page_bytes;
  std::byte* pages = begin - lead;
  size += lead;
  unsigned char is_there = 1;
  if (::mincore(pages + size / 2 / page_bytes * page_bytes, page_bytes, &is_there) != 0 || (is_there & 1) != 0) return;
#ifdef MADV_POPULATE_WRITE
  static_cast<void>(::madvise(pages, size, MADV_POPULATE_WRITE));
#else
  constexpr int kPopulateWrite = 23;  // of Linux 5.14, newer than the headers
  static_cast<void>(::madvise(pages, size, kPopulateWrite));
#endif
}

}  // namespace dcp_fast::copy
