#include "transfer/schedule.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace dcp_fast::transfer {

namespace {

using box::Dim;
using box::Loops;

bool is_one_request(const Policy& policy, const Loops& loops, size_t level) {
  return level + 1 == loops.size() || policy.reads_through(loops, level);
}

// What reading loops[level..] costs, in bytes. Where there are many requests, each adds its own cost: a box of small
// runs far apart is as much work as a large contiguous one, and is shared among threads like it.
int64_t read_cost(const Policy& policy, const Loops& loops, size_t level) {
  if (is_one_request(policy, loops, level)) return box::source_span(loops, level);
  const bool requests = is_one_request(policy, loops, level + 1);
  return loops[level].size * (read_cost(policy, loops, level + 1) + (requests ? policy.request_cost : 0));
}

class Splitter {
 public:
  Splitter(const Policy& policy, std::vector<Piece>& pieces) : policy_(policy), pieces_(pieces) {}

  void split(const Piece& piece) {
    if (piece.loops.empty()) return;
    const Dim outer = piece.loops[0];
    const bool contiguous = piece.loops.size() == 1;
    const int64_t most = contiguous ? policy_.run_bytes : policy_.block_bytes;
    if (read_cost(policy_, piece.loops, 0) <= most) {
      pieces_.push_back(piece);
      return;
    }
    const int64_t step =
        is_one_request(policy_, piece.loops, 0) ? outer.source_stride : read_cost(policy_, piece.loops, 0) / outer.size;
    const int64_t group = std::max<int64_t>(1, most / step);
    for (int64_t begin = 0; begin < outer.size; begin += group) {
      Piece part = piece;
      part.source += begin * outer.source_stride;
      part.destination += begin * outer.destination_stride;
      part.loops[0].size = std::min(group, outer.size - begin);
      if (part.loops[0].size > 1 || contiguous) {
        pieces_.push_back(std::move(part));
      } else {
        part.loops.erase(part.loops.begin());
        split(part);
      }
    }
  }

 private:
  const Policy& policy_;
  std::vector<Piece>& pieces_;
};

}  // namespace

bool Policy::reads_through(const Loops& loops, size_t level) const {
  if (level + 1 >= loops.size()) return whole_pages;
  for (size_t i = level; i + 1 < loops.size(); ++i) {
    if (loops[i].source_stride - box::source_span(loops, i + 1) > request_cost) return false;
  }
  return true;
}

std::vector<Policy> policies_for(const io::ByteSources& sources, int64_t block_bytes, int64_t run_bytes) {
  std::vector<Policy> policies;
  policies.reserve(sources.size());
  for (const auto& source : sources) {
    const io::Access& access = source->access();
    policies.push_back({access.request_cost, block_bytes, access.whole_pages, run_bytes, access.mapped});
  }
  return policies;
}

std::vector<Piece> split_boxes(const std::vector<Piece>& boxes, const std::vector<Policy>& policies) {
  std::vector<Piece> pieces;
  for (const Piece& box : boxes) Splitter(policies[box.file], pieces).split(box);
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return std::tie(a.file, a.source) < std::tie(b.file, b.source); });
  return pieces;
}

Schedule join_pieces(std::vector<Piece> unjoined, const std::vector<Policy>& policies) {
  Schedule schedule;
  schedule.pieces = std::move(unjoined);
  const std::vector<Piece>& pieces = schedule.pieces;
  const auto range_of = [&](size_t i) {
    return Range{pieces[i].file, pieces[i].source, pieces[i].source + box::source_span(pieces[i].loops)};
  };
  const auto comes_at_once = [&](const Piece& piece) {
    return piece.loops.size() == 1 || policies[piece.file].reads_through(piece.loops, 0);
  };
  schedule.tasks = join_neighbours(pieces.size(), policies, range_of, [&](const Range& before, size_t i) {
    // Boxes that interleave are read one after another.
    return pieces[i].source >= before.end && comes_at_once(pieces[i]) && comes_at_once(pieces[i - 1]);
  });
  return schedule;
}

}  // namespace dcp_fast::transfer
