// Sets of addresses, as sorted half-open intervals that do not touch each other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simcuda {

struct Interval {
  uint64_t begin = 0;
  uint64_t end = 0;

  uint64_t size() const { return end - begin; }
  bool overlaps(const Interval& other) const { return begin < other.end && other.begin < end; }
  bool covers(const Interval& other) const { return begin <= other.begin && other.end <= end; }
};

using Intervals = std::vector<Interval>;

inline Interval bounds(const Intervals& intervals) { return {intervals.front().begin, intervals.back().end}; }

// The first part that two sets share; empty if there is none.
inline Interval first_overlap(const Intervals& left, const Intervals& right) {
  auto one = left.begin();
  auto other = right.begin();
  while (one != left.end() && other != right.end()) {
    if (one->overlaps(*other)) return {std::max(one->begin, other->begin), std::min(one->end, other->end)};
    if (one->end <= other->begin) {
      ++one;
    } else {
      ++other;
    }
  }
  return {};
}

}  // namespace simcuda
