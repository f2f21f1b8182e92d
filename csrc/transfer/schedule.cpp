#include "transfer/schedule.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace dcp_fast::transfer {

namespace {

using box::Dim;
using box::Loops;

constexpr int64_t kConvertedBytes = 1 << 20;

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

  // `block`: what a request brings so far, which the next one of the same file may be joined to.
  void split(const Piece& piece, Range& block) {
    const bool contiguous = piece.loops.size() == 1;
    if (contiguous && policy_.fills_blocks && piece.conversion == nullptr) {
      fill(piece, block);
    } else {
      split(piece);
      block = {};
    }
  }

 private:
  void fill(Piece piece, Range& block) {
    const int64_t least = policy_.block_bytes / 8;  // that a box is cut for
    for (int64_t left = piece.loops[0].size; left > 0;) {
      int64_t room = policy_.block_bytes - (piece.source - block.begin);
      const int64_t gap = piece.source - block.end;
      if (piece.file != block.file || gap < 0 || gap > policy_.request_cost || room < std::min(left, least)) {
        block = {piece.file, piece.source, piece.source};
        room = policy_.block_bytes;
      }
      const int64_t size = std::min(left, room);
      piece.loops[0].size = size;
      pieces_.push_back(piece);
      piece.source += size;
      piece.destination += size;
      block.end = piece.source;
      left -= size;
    }
  }

  void split(const Piece& piece) {
    if (piece.loops.empty()) return;
    const Dim outer = piece.loops[0];
    const bool contiguous = piece.loops.size() == 1;
    const int64_t most = piece.conversion != nullptr ? policy_.converted_bytes
                         : contiguous                ? policy_.run_bytes
                                                     : policy_.block_bytes;
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

int64_t Policy::bytes_of_request(int64_t begin, int64_t end, int64_t file_size) const {
  if (!whole_pages) return end - begin;
  constexpr auto kPage = static_cast<int64_t>(io::kPageBytes);
  return std::min((end + kPage - 1) / kPage * kPage, file_size) - begin / kPage * kPage;
}

std::vector<Policy> policies_for(const io::ByteSources& sources, const Limits& limits, bool mapped) {
  std::vector<Policy> policies;
  policies.reserve(sources.size());
  for (const auto& source : sources) {
    const io::Access& access = source->access();
    const int64_t block = limits.block_of(access);
    // Where bytes come from the page cache, they are converted before they leave the processor's own cache.
    const int64_t converted = access.whole_pages ? block : std::min(block, kConvertedBytes);
    const int64_t request_cost = std::min(access.request_cost, limits.most_gap);
    policies.push_back({request_cost, block, access.whole_pages, block, access.whole_pages, converted,
                        mapped && access.mapped, access.shared});
  }
  return policies;
}

std::vector<Piece> split_boxes(std::vector<Piece> boxes, const std::vector<Policy>& policies) {
  const auto ascend = [](std::vector<Piece>& all) {
    std::sort(all.begin(), all.end(),
              [](const Piece& a, const Piece& b) { return std::tie(a.file, a.source) < std::tie(b.file, b.source); });
  };
  ascend(boxes);
  std::vector<Piece> pieces;
  Range block;
  for (const Piece& box : boxes) Splitter(policies[box.file], pieces).split(box, block);
  ascend(pieces);
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
