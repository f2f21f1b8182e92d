// Memory for kernels in tests: any 64-bit address, yet only the pages that are touched exist. So offsets beyond 4 GiB
// can be tested on any machine. It can also hold a kernel to writing each byte once.
#pragma once

#include <algorithm>
#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "ptx/interpreter.h"

namespace simcuda::testing {

enum class Access { kRead, kReadWrite, kWriteOnce };

class SparseMemory : public ptx::Memory {
 public:
  // Kernels may touch what was allowed, and nothing else.
  void allow(uint64_t begin, uint64_t bytes, Access access) {
    if (bytes > 0) regions_.push_back({begin, begin + bytes, access});
  }

  std::byte* access(uint64_t address, size_t bytes, bool write) override {
    for (const Region& region : regions_) {
      if (address < region.begin || address >= region.end || bytes > region.end - address) continue;
      if (write ? region.access == Access::kRead : region.access == Access::kWriteOnce) break;
      if (write && region.access == Access::kWriteOnce) mark_as_written(address, bytes);
      return at(address);
    }
    throw std::runtime_error(std::string(write ? "write" : "read") + " out of bounds at " + std::to_string(address));
  }

  // For the host. Valid up to the page's end.
  std::byte* at(uint64_t address) { return &page_of(address).bytes[address % kPageBytes]; }

  void write(uint64_t address, const void* data, size_t bytes) {
    const auto* from = static_cast<const std::byte*>(data);
    for (size_t i = 0; i < bytes; ++i) *at(address + i) = from[i];
  }

  bool same_bytes(const SparseMemory& other) const { return covers(other) && other.covers(*this); }

 private:
  static constexpr uint64_t kPageBytes = 1024;
  static constexpr std::byte kPoison{0xEE};
  struct Page {
    Page() { bytes.fill(kPoison); }
    std::array<std::byte, kPageBytes> bytes;
    std::bitset<kPageBytes> written;
  };
  struct Region {
    uint64_t begin;
    uint64_t end;
    Access access;
  };

  Page& page_of(uint64_t address) { return pages_[address / kPageBytes]; }

  void mark_as_written(uint64_t address, size_t bytes) {
    Page& page = page_of(address);
    for (size_t i = address % kPageBytes; i < address % kPageBytes + bytes; ++i) {
      if (page.written[i]) throw std::runtime_error("a second write at " + std::to_string(address));
      page.written.set(i);
    }
  }

  bool covers(const SparseMemory& other) const {
    return std::all_of(pages_.begin(), pages_.end(), [&](const auto& page) {
      const auto found = other.pages_.find(page.first);
      if (found != other.pages_.end()) return found->second.bytes == page.second.bytes;
      return std::all_of(page.second.bytes.begin(), page.second.bytes.end(), [](std::byte b) { return b == kPoison; });
    });
  }

  std::vector<Region> regions_;
  std::map<uint64_t, Page> pages_;
};

}  // namespace simcuda::testing
