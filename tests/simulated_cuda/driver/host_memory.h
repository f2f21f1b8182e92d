// The host memory that the driver knows: registered by the program, or allocated for it. Only from and to such memory
// do copies run while the host goes on.
#pragma once

#include <cstdint>
#include <deque>
#include <map>

#include "driver/intervals.h"
#include "driver/races.h"

namespace simcuda {

struct Context;

enum class HostOrigin { kRegistered, kAllocated };
enum class Portability { kContext, kPortable };  // whether other contexts take the range for pinned as well

struct HostRange {
  Interval range;
  HostOrigin origin = HostOrigin::kRegistered;
  Portability portability = Portability::kContext;
  Context* context = nullptr;
  History history;
};

class HostMemory {
 public:
  // Null if it overlaps a range that is known.
  HostRange* add(HostRange range);
  void remove(const HostRange& range);

  // The range that begins at the address, or null.
  HostRange* at(const void* address);
  // The range that the whole interval lies in, or null.
  HostRange* find(Interval interval);
  // Whether the interval touches memory that was known once.
  bool was_removed(Interval interval) const;

  std::map<uint64_t, HostRange>& ranges() { return ranges_; }

 private:
  std::map<uint64_t, HostRange> ranges_;
  std::deque<Interval> removed_;
};

}  // namespace simcuda
