// The memory of one device. It is one file in memory that is mapped twice: inaccessible at the device addresses, so
// that a host that follows a device pointer crashes, and readable and writable elsewhere for the simulator's own
// threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "driver/intervals.h"
#include "driver/races.h"

namespace simcuda {

// What memory holds that nobody has written yet.
constexpr int kPoison = 0xCB;

struct Allocation {
  Interval range;
  History history;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(int device);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // A fresh allocation, poisoned. Null if the device would then use more than the limit.
  Allocation* allocate(size_t bytes, size_t limit, bool poison);
  // Its addresses are not used again for as long as others are left.
  void free(const Allocation& allocation);
  void free_all();

  // The live allocation that the address lies in, or null.
  Allocation* find(uint64_t address);
  // The live allocation that all of the range lies in, or null.
  Allocation* find(Interval range);
  // Says what a range is that lies in no live allocation.
  std::string what_is_wrong_with(Interval range);
  bool owns(uint64_t address) const { return base_ <= address && address < base_ + kSpace; }

  // Where the simulator's threads find what lies at a device address.
  std::byte* alias(uint64_t address) const { return alias_ + (address - base_); }

  size_t used() const { return used_; }
  const std::map<uint64_t, Allocation>& allocations() const { return allocations_; }

 private:
  static constexpr uint64_t kSpace = uint64_t{1} << 38;

  uint64_t find_room(uint64_t bytes);

  int device_;
  int file_ = -1;
  uint64_t base_ = 0;
  std::byte* alias_ = nullptr;
  uint64_t next_ = 0;
  size_t used_ = 0;
  std::map<uint64_t, Allocation> allocations_;
  std::map<uint64_t, uint64_t> freed_;  // begin -> end of the allocations that are no more
};

}  // namespace simcuda
