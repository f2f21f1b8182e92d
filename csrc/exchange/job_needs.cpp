#include "exchange/job_needs.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "exchange/mixed.h"

namespace dcp_fast::exchange {

namespace {

// A box among those of all needs.
struct Entry {
  uint64_t shape = 0;  // of the loops
  int64_t begin = 0;
  uint32_t file = 0;
  uint32_t need = 0;
  uint32_t index = 0;  // of the box in the need
};

uint64_t shape_of(const Need& need, const NeededBox& box) {
  uint64_t shape = mixed(static_cast<uint64_t>(box.grain));
  for (const box::Dim* loop = need.loops(box); loop != need.loops(box) + box.depth; ++loop) {
    shape = mixed(shape ^ static_cast<uint64_t>(loop->size));
    shape = mixed(shape ^ static_cast<uint64_t>(loop->source_stride));
  }
  return shape;
}

std::vector<Entry> sorted_boxes(const std::vector<Need>& needs) {
  std::vector<Entry> entries;
  size_t count = 0;
  for (const Need& need : needs) count += need.boxes().size();
  entries.reserve(count);
  for (size_t need = 0; need < needs.size(); ++need) {
    const std::vector<NeededBox>& boxes = needs[need].boxes();
    for (size_t i = 0; i < boxes.size(); ++i) {
      entries.push_back({shape_of(needs[need], boxes[i]), boxes[i].begin, boxes[i].file, static_cast<uint32_t>(need),
                         static_cast<uint32_t>(i)});
    }
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.file, a.begin, a.shape, a.need, a.index) < std::tie(b.file, b.begin, b.shape, b.need, b.index);
  });
  return entries;
}

// Sorts boxes into common needs, by the needs that have them.
class Sorter {
 public:
  explicit Sorter(const std::vector<Need>& needs, uint32_t own) : needs_(needs), own_(own) {}

  void run() {
    const std::vector<Entry> entries = sorted_boxes(needs_);
    for (auto begin = entries.begin(); begin != entries.end();) {
      const auto end = std::find_if(begin, entries.end(), [&](const Entry& entry) { return !alike(*begin, entry); });
      add(&*begin, &*begin + (end - begin));
      begin = end;
    }
  }

  // A box of a common need, as it is in one of the needs.
  struct Sorted {
    uint32_t common = 0;
    uint32_t need = 0;
    uint32_t index = 0;
  };
  std::vector<Sorted> boxes;  // ascending
  std::vector<std::vector<uint32_t>> needs_of_common;

 private:
  const NeededBox& box(const Entry& entry) const { return needs_[entry.need].boxes()[entry.index]; }

  // Shapes may be alike by chance.
  bool alike(const Entry& a, const Entry& b) const {
    if (std::tie(a.file, a.begin, a.shape) != std::tie(b.file, b.begin, b.shape)) return false;
    const NeededBox& of_a = box(a);
    const NeededBox& of_b = box(b);
    if (std::tie(of_a.depth, of_a.grain) != std::tie(of_b.depth, of_b.grain)) return false;
    const box::Dim* loops = needs_[a.need].loops(of_a);
    return std::equal(loops, loops + of_a.depth, needs_[b.need].loops(of_b), [](const box::Dim& x, const box::Dim& y) {
      return std::tie(x.size, x.source_stride) == std::tie(y.size, y.source_stride);
    });
  }

  // Boxes that are alike, by need. A need may have some of them several times: of each need the first ones belong
  // together, then the second ones, and so on.
  void add(const Entry* begin, const Entry* end) {
    std::vector<const Entry*> left;
    for (const Entry* entry = begin; entry != end; ++entry) left.push_back(entry);
    while (!left.empty()) {
      std::vector<const Entry*> again;
      const Entry* shown = left.front();  // whose number the box gets
      of_box_.clear();
      for (const Entry* entry : left) {
        if (!of_box_.empty() && of_box_.back() == entry->need) {
          again.push_back(entry);
          continue;
        }
        of_box_.push_back(entry->need);
        if (entry->need == own_) shown = entry;
      }
      const auto number = static_cast<uint32_t>(needs_of_common.size());
      const auto [found, is_new] = numbers_.try_emplace(of_box_, number);
      if (is_new) needs_of_common.push_back(of_box_);
      boxes.push_back({found->second, shown->need, shown->index});
      left = std::move(again);
    }
  }

  const std::vector<Need>& needs_;
  const uint32_t own_;
  std::vector<uint32_t> of_box_;
  std::map<std::vector<uint32_t>, uint32_t> numbers_;
};

// The boxes of each common need. Large needs of single ranks are moved.
std::vector<Need> boxes_of(const Sorter& sorter, std::vector<Need>& needs) {
  std::vector<size_t> counts(sorter.needs_of_common.size(), 0);
  for (const Sorter::Sorted& box : sorter.boxes) ++counts[box.common];
  std::vector<Need> common(counts.size(), Need({}));
  std::vector<bool> is_whole(counts.size(), false);
  for (size_t i = 0; i < counts.size(); ++i) {
    const std::vector<uint32_t>& of = sorter.needs_of_common[i];
    is_whole[i] = of.size() == 1 && counts[i] == needs[of.front()].boxes().size();
    if (is_whole[i]) common[i] = std::move(needs[of.front()]);
  }
  for (const auto& [number, need, index] : sorter.boxes) {
    if (!is_whole[number]) common[number].append(needs[need], needs[need].boxes()[index]);
  }
  return common;
}

}  // namespace

JobNeeds needs_of_job(std::vector<Need> needs, const Ranks& ranks, uint32_t own) {
  JobNeeds job;
  std::map<int64_t, uint32_t> nodes;
  for (const int64_t node : ranks.nodes) {
    job.nodes.push_back(nodes.try_emplace(node, static_cast<uint32_t>(nodes.size())).first->second);
  }
  job.read_before = ranks.read_before;
  job.read_before.resize(job.nodes.size(), 0);
  std::vector<std::vector<uint32_t>> ranks_of_need(needs.size());
  for (size_t rank = 0; rank < ranks.needs.size(); ++rank) {
    ranks_of_need.at(ranks.needs[rank]).push_back(static_cast<uint32_t>(rank));
  }
  Sorter sorter(needs, own);
  sorter.run();
  std::vector<Need> boxes = boxes_of(sorter, needs);
  for (size_t i = 0; i < boxes.size(); ++i) {
    CommonNeed common{std::move(boxes[i]), {}, {}};
    for (const uint32_t need : sorter.needs_of_common[i]) {
      common.ranks.insert(common.ranks.end(), ranks_of_need[need].begin(), ranks_of_need[need].end());
    }
    if (common.ranks.empty()) continue;
    std::sort(common.ranks.begin(), common.ranks.end(),
              [&](uint32_t a, uint32_t b) { return std::tie(job.nodes[a], a) < std::tie(job.nodes[b], b); });
    for (uint32_t at = 0; at < common.ranks.size(); ++at) {
      const uint32_t node = job.nodes[common.ranks[at]];
      if (common.groups.empty() || common.groups.back().node != node) common.groups.push_back({node, at, at});
      common.groups.back().end = at + 1;
    }
    job.needs.push_back(std::move(common));
  }
  return job;
}

}  // namespace dcp_fast::exchange
