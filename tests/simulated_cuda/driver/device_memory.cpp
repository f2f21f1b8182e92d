#include "driver/device_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>
#include <sstream>
#include <system_error>

namespace simcuda {

namespace {

constexpr uint64_t kPage = 4096;
constexpr size_t kMostFreedRemembered = 10000;

uint64_t whole_pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

std::byte* map(int file, size_t bytes, int protection) {
  void* address = ::mmap(nullptr, bytes, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (address == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of device memory");
  // A core file of hundreds of gigabytes helps nobody.
  ::madvise(address, bytes, MADV_DONTDUMP);
  return static_cast<std::byte*>(address);
}

}  // namespace

DeviceMemory::DeviceMemory(int device) : device_(device) {
  file_ = ::memfd_create("simcuda", MFD_CLOEXEC);
  if (file_ < 0 || ::ftruncate(file_, static_cast<off_t>(kSpace)) != 0) {
    throw std::system_error(errno, std::generic_category(), "memfd for device memory");
  }
  base_ = reinterpret_cast<uint64_t>(map(file_, kSpace, PROT_NONE));
  alias_ = map(file_, kSpace, PROT_READ | PROT_WRITE);
  next_ = base_;
}

DeviceMemory::~DeviceMemory() {
  ::munmap(alias_, kSpace);
  ::munmap(reinterpret_cast<void*>(base_), kSpace);
  ::close(file_);
}

Allocation* DeviceMemory::allocate(size_t bytes, size_t limit, bool poison) {
  if (bytes > limit || used_ > limit - bytes) return nullptr;
  const uint64_t begin = find_room(whole_pages(bytes) + kPage);
  if (begin == 0) return nullptr;
  next_ = begin + whole_pages(bytes) + kPage;
  freed_.erase(freed_.lower_bound(begin), freed_.lower_bound(next_));
  if (poison) std::memset(alias(begin), kPoison, bytes);
  used_ += bytes;
  return &allocations_.emplace(begin, Allocation{{begin, begin + bytes}, {}}).first->second;
}

// A page is left free behind every allocation, so that running over an end never meets the neighbour.
uint64_t DeviceMemory::find_room(uint64_t bytes) {
  const uint64_t end = base_ + kSpace;
  if (bytes <= end - next_) {
    const auto following = allocations_.lower_bound(next_);
    if (following == allocations_.end() || following->first - next_ >= bytes) return next_;
  }
  uint64_t candidate = base_;
  for (const auto& [begin, allocation] : allocations_) {
    if (begin - candidate >= bytes) return candidate;
    candidate = begin + whole_pages(allocation.range.size()) + kPage;
  }
  return bytes <= end - candidate ? candidate : 0;
}

void DeviceMemory::free(const Allocation& allocation) {
  const Interval range = allocation.range;
  // Gives the pages back to the system: what is allocated here next is poisoned anew.
  ::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(range.begin - base_),
              static_cast<off_t>(whole_pages(range.size())));
  used_ -= range.size();
  if (freed_.size() >= kMostFreedRemembered) freed_.erase(freed_.begin());
  freed_[range.begin] = range.end;
  allocations_.erase(range.begin);
}

void DeviceMemory::free_all() {
  while (!allocations_.empty()) free(allocations_.begin()->second);
}

Allocation* DeviceMemory::find(uint64_t address) {
  auto following = allocations_.upper_bound(address);
  if (following == allocations_.begin()) return nullptr;
  Allocation& allocation = std::prev(following)->second;
  return address < allocation.range.end ? &allocation : nullptr;
}

Allocation* DeviceMemory::find(Interval range) {
  Allocation* allocation = find(range.begin);
  return allocation != nullptr && allocation->range.covers(range) ? allocation : nullptr;
}

std::string DeviceMemory::what_is_wrong_with(Interval range) {
  std::ostringstream text;
  text << std::hex;
  const auto following = freed_.upper_bound(range.begin);
  const bool freed = following != freed_.begin() && range.begin < std::prev(following)->second;
  text << (freed ? "USE-AFTER-FREE" : "OUT-OF-BOUNDS") << ": [0x" << range.begin << ", 0x" << range.end
       << ") of device " << std::dec << device_;
  if (freed) {
    text << " lies in memory that was freed";
  } else if (Allocation* allocation = find(range.begin)) {
    text << " runs " << range.end - allocation->range.end << " bytes over the end of an allocation of "
         << allocation->range.size();
  } else {
    text << " lies in no allocation";
  }
  return text.str();
}

}  // namespace simcuda
