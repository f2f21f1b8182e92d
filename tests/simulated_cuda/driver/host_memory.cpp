#include "driver/host_memory.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace simcuda {

namespace {

constexpr size_t kMostRemovedRemembered = 1000;

}  // namespace

HostRange* HostMemory::add(HostRange range) {
  const Interval interval = range.range;
  const auto following = ranges_.lower_bound(interval.begin);
  if (following != ranges_.end() && following->second.range.overlaps(interval)) return nullptr;
  if (following != ranges_.begin() && std::prev(following)->second.range.overlaps(interval)) return nullptr;
  return &ranges_.emplace(interval.begin, std::move(range)).first->second;
}

void HostMemory::remove(const HostRange& range) {
  if (removed_.size() == kMostRemovedRemembered) removed_.pop_front();
  removed_.push_back(range.range);
  ranges_.erase(range.range.begin);
}

HostRange* HostMemory::at(const void* address) {
  const auto found = ranges_.find(reinterpret_cast<uint64_t>(address));
  return found == ranges_.end() ? nullptr : &found->second;
}

HostRange* HostMemory::find(Interval interval) {
  const auto following = ranges_.upper_bound(interval.begin);
  if (following == ranges_.begin()) return nullptr;
  HostRange& range = std::prev(following)->second;
  return range.range.covers(interval) ? &range : nullptr;
}

bool HostMemory::was_removed(Interval interval) const {
  return std::any_of(removed_.begin(), removed_.end(), [&](const Interval& old) { return old.overlaps(interval); });
}

}  // namespace simcuda
