#include "transfer/waves.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <optional>
#include <utility>

namespace dcp_fast::transfer {

namespace {

using Pair = std::pair<size_t, size_t>;  // the earlier write, the later one

bool boxes_overlap(const Write& a, const Write& b) {
  for (size_t dim = 0; dim < a.dims; ++dim) {
    if (a.offsets[dim] >= b.offsets[dim] + b.sizes[dim] || b.offsets[dim] >= a.offsets[dim] + a.sizes[dim]) {
      return false;
    }
  }
  return true;
}

bool conflict(const Write& a, const Write& b) {
  if (a.destination == b.destination) return boxes_overlap(a, b);
  return a.begin < b.end && b.begin < a.end;
}

// Compares every write with those after it that `start` before it `end`s. nullopt past the limits.
template <typename Start, typename End>
std::optional<std::vector<Pair>> sweep(const std::vector<Write>& writes, std::vector<size_t> members,
                                       const ConflictLimits& limits, const Start& start, const End& end) {
  std::vector<Pair> pairs;
  size_t comparisons = limits.comparisons * members.size();
  const size_t most_pairs = limits.conflicts * members.size();
  std::sort(members.begin(), members.end(), [&](size_t a, size_t b) { return start(writes[a]) < start(writes[b]); });
  for (size_t i = 0; i < members.size(); ++i) {
    for (size_t j = i + 1; j < members.size() && start(writes[members[j]]) < end(writes[members[i]]); ++j) {
      if (comparisons-- == 0 || pairs.size() > most_pairs) return std::nullopt;
      if (conflict(writes[members[i]], writes[members[j]])) pairs.emplace_back(std::minmax(members[i], members[j]));
    }
  }
  return pairs;
}

// The dimension along which the boxes start at the most different places.
size_t widest_dim(const std::vector<Write>& writes, const std::vector<size_t>& members) {
  size_t widest = 0;
  size_t most = 0;
  std::vector<int64_t> starts(members.size());
  for (size_t dim = 0; dim < writes[members[0]].dims; ++dim) {
    std::transform(members.begin(), members.end(), starts.begin(),
                   [&](size_t member) { return writes[member].offsets[dim]; });
    std::sort(starts.begin(), starts.end());
    const auto distinct = static_cast<size_t>(std::unique(starts.begin(), starts.end()) - starts.begin());
    if (distinct > most) {
      most = distinct;
      widest = dim;
    }
  }
  return widest;
}

// Conflicts among writes whose address ranges overlap; nullopt past the limits.
std::optional<std::vector<Pair>> find_conflicts(const std::vector<Write>& writes, const std::vector<size_t>& members,
                                                const ConflictLimits& limits) {
  const size_t destination = writes[members[0]].destination;
  const bool one = std::all_of(members.begin(), members.end(),
                               [&](size_t member) { return writes[member].destination == destination; });
  if (one) {
    // Strided boxes of one tensor interleave in memory without touching each other, so the boxes are compared.
    const size_t dim = widest_dim(writes, members);
    if (writes[members[0]].dims > 0) {
      const auto start = [dim](const Write& write) { return write.offsets[dim]; };
      const auto end = [dim](const Write& write) { return write.offsets[dim] + write.sizes[dim]; };
      return sweep(writes, members, limits, start, end);
    }
  }
  return sweep(
      writes, members, limits, [](const Write& write) { return write.begin; },
      [](const Write& write) { return write.end; });
}

// The first wave in which each address may be written again, by the start of its range.
class AddressWaves {
 public:
  // The wave of the next write, which waits for all earlier ones of its range.
  int32_t add(const Write& write) {
    const auto end = split(write.end);
    const auto begin = split(write.begin);
    int32_t wave = 0;
    for (auto range = begin; range != end; ++range) wave = std::max(wave, range->second);
    // Each range is looked at once and then gone: n writes make no more than 2n of them.
    begin->second = wave + 1;
    ranges_.erase(std::next(begin), end);
    return wave;
  }

 private:
  using Ranges = std::map<uint64_t, int32_t>;

  Ranges::iterator split(uint64_t address) {
    const auto next = ranges_.upper_bound(address);
    const auto range = std::prev(next);
    return range->first == address ? range : ranges_.emplace_hint(next, address, range->second);
  }

  Ranges ranges_{{0, 0}};
};

// For writes whose address ranges overlap, in ascending order.
void assign_group(const std::vector<Write>& writes, const std::vector<size_t>& members, const ConflictLimits& limits,
                  std::vector<int32_t>& waves) {
  std::optional<std::vector<Pair>> pairs = find_conflicts(writes, members, limits);
  if (!pairs) {
    AddressWaves addresses;
    for (const size_t member : members) waves[member] = addresses.add(writes[member]);
    return;
  }
  // In the order of the later write: when it is reached, the waves of all earlier writes are final.
  std::sort(pairs->begin(), pairs->end(), [](const Pair& a, const Pair& b) { return a.second < b.second; });
  for (const auto& [earlier, later] : *pairs) waves[later] = std::max(waves[later], waves[earlier] + 1);
}

}  // namespace

std::vector<int32_t> assign_waves(const std::vector<Write>& writes, const ConflictLimits& limits) {
  std::vector<size_t> order;
  for (size_t i = 0; i < writes.size(); ++i) {
    if (writes[i].begin < writes[i].end) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return writes[a].begin < writes[b].begin; });
  std::vector<int32_t> waves(writes.size(), 0);
  for (size_t i = 0; i < order.size();) {
    uint64_t end = writes[order[i]].end;
    size_t next = i + 1;
    while (next < order.size() && writes[order[next]].begin < end) end = std::max(end, writes[order[next++]].end);
    if (next - i > 1) {
      std::vector<size_t> members(order.begin() + static_cast<std::ptrdiff_t>(i),
                                  order.begin() + static_cast<std::ptrdiff_t>(next));
      std::sort(members.begin(), members.end());
      assign_group(writes, members, limits, waves);
    }
    i = next;
  }
  return waves;
}

}  // namespace dcp_fast::transfer
