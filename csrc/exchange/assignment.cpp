#include "exchange/assignment.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "exchange/mixed.h"

namespace dcp_fast::exchange {

namespace {

// Units are what is read and sent at once.
constexpr int64_t kMostUnit = 4 << 20;
constexpr int64_t kLeastUnit = 256 << 10;  // unless a round has no room for it
// Smaller pieces join their neighbours, whoever needs them: to send a few bytes to a rank costs less than a request.
constexpr int64_t kSmallPiece = 64 << 10;
// What lies between the payloads of neighbouring records is read through.
constexpr int64_t kGap = 8 << 10;
// Blocks are long stretches for storage that reads ahead, and small enough that ranks read equally much.
constexpr int64_t kMostBlock = 64 << 20;
constexpr int64_t kBlocksPerRank = 16;

// What is sent in the last round is not hidden behind reads, so that rounds are small where there are few bytes. Where
// there are many ranks they are not, as each of them gets a message in every round.
constexpr int64_t kWantedRounds = 32;
constexpr int64_t kLeastRound = 4 << 20;
constexpr int64_t kLeastMessage = 64 << 10;

RoundLimits wanted_limits(const JobNeeds& job, const RoundLimits& limits) {
  const auto ranks = static_cast<int64_t>(job.nodes.size());
  double bytes = 0;  // that all ranks receive
  for (const CommonNeed& common : job.needs) {
    for (const NeededBox& box : common.need.boxes()) {
      bytes += static_cast<double>(common.need.bytes_within(box, box.begin, box.end)) *
               static_cast<double>(common.ranks.size());
    }
  }
  const auto of_round = static_cast<int64_t>(bytes / static_cast<double>(ranks * kWantedRounds));
  const int64_t wanted = std::max({of_round, kLeastRound, ranks * kLeastMessage});
  return {std::min(wanted, limits.send_bytes), std::min(wanted, limits.receive_bytes)};
}

struct Event {
  uint32_t file;
  bool begins;
  uint32_t need;
  uint32_t box;
  int64_t position;
};

}  // namespace

// Walks through all files, over the borders of all boxes, and makes units of what lies between.
class Assignment::Sweep {
 public:
  Sweep(const std::vector<CommonNeed>& needs, int64_t send_bytes)
      : needs_(needs), send_bytes_(send_bytes), active_(needs.size(), 0) {}

  void run() {
    std::vector<Event> events;
    size_t boxes = 0;
    for (const CommonNeed& common : needs_) boxes += common.need.boxes().size();
    events.reserve(2 * boxes);
    for (size_t need = 0; need < needs_.size(); ++need) {
      const std::vector<NeededBox>& of_need = needs_[need].need.boxes();
      for (size_t i = 0; i < of_need.size(); ++i) {
        const auto [n, b] = std::pair(static_cast<uint32_t>(need), static_cast<uint32_t>(i));
        events.push_back({of_need[i].file, true, n, b, of_need[i].begin});
        events.push_back({of_need[i].file, false, n, b, of_need[i].end});
      }
    }
    std::sort(events.begin(), events.end(), [](const Event& a, const Event& b) {
      return std::tie(a.file, a.position, a.begins, a.need, a.box) <
             std::tie(b.file, b.position, b.begins, b.need, b.box);
    });
    int64_t position = 0;
    for (const Event& event : events) {
      if (boxes_here_ > 0) add_interval(event.file, position, event.position);
      position = event.position;
      take(event);
      if (!obstacle.empty()) return;
    }
  }

  std::vector<Unit> units;
  std::vector<uint64_t> signatures;  // of the needs of each unit
  std::string obstacle;

 private:
  void take(const Event& event) {
    const Need& need = needs_[event.need].need;
    const NeededBox& box = need.boxes()[event.box];
    const auto ranks = static_cast<double>(needs_[event.need].ranks.size());
    const double share = ranks * static_cast<double>(need.bytes_within(box, box.begin, box.end)) /
                         static_cast<double>(box.end - box.begin);
    if (event.begins) {
      if (boxes_here_ > 0) check_border(event.position);
      if (boxes_here_ == 0 || box.grain > grain_) std::tie(grain_begin_, grain_) = std::pair(box.begin, box.grain);
      ++boxes_here_;
      density_ += share;
      if (active_[event.need]++ == 0) signature_ ^= mixed(event.need);
    } else {
      --boxes_here_;
      if (boxes_here_ > 0) check_border(event.position);
      density_ = boxes_here_ == 0 ? 0 : density_ - share;
      if (--active_[event.need] == 0) signature_ ^= mixed(event.need);
    }
  }

  // Units begin and end where boxes do, which must not be within an element of another box.
  void check_border(int64_t position) {
    if ((position - grain_begin_) % grain_ != 0) obstacle = "records of the checkpoint overlap";
  }

  void add_interval(uint32_t file, int64_t begin, int64_t end) {
    if (begin == end) return;
    // Relays send most of the copies, but that allows no larger units. In a full round each rank sends as much as it
    // has memory for, and of each unit that it owns all ranks together send all copies: so many units of each owner
    // have room, whoever sends them. With units that owners cannot send in every round, rounds are half empty: 512
    // replicas took 8,964 rounds of units of 256 KiB, and 4,216 of units of 64 KiB.
    const auto room = static_cast<double>(send_bytes_);
    const double copies = std::max(density_, 1e-3);  // of a byte that are sent
    const double wanted = std::max(room / (2 * copies), std::min(double{kLeastUnit}, room / copies));
    const auto most = static_cast<int64_t>(std::clamp(wanted, 16.0, double{kMostUnit}));
    const int64_t size = end - begin;
    const bool joins =
        !units.empty() && units.back().file == file && begin - units.back().end <= kGap &&
        end - units.back().begin <= std::min(most, most_) &&
        (signature_ == signatures.back() || size < kSmallPiece || units.back().end - units.back().begin < kSmallPiece);
    if (joins) {
      units.back().end = end;
      return;
    }
    // Pieces of about the same size, cut where elements end.
    const int64_t pieces = (size + most - 1) / most;
    int64_t from = begin;
    for (int64_t i = 1; i <= pieces; ++i) {
      int64_t to = begin + size / pieces * i + size % pieces * i / pieces;
      if (i < pieces) to -= ((to - grain_begin_) % grain_ + grain_) % grain_;
      if (to <= from) continue;
      units.push_back({file, 0, from, to, 0});
      signatures.push_back(signature_);
      from = to;
    }
    most_ = most;
  }

  const std::vector<CommonNeed>& needs_;
  const int64_t send_bytes_;
  std::vector<uint32_t> active_;  // boxes of each need at this position
  int64_t boxes_here_ = 0;
  uint64_t signature_ = 0;  // of the needs that have a box here
  double density_ = 0;      // how many ranks need a byte here, on average
  int64_t grain_begin_ = 0;
  int32_t grain_ = 1;
  int64_t most_ = 0;  // to which the last unit may grow
};

Assignment::Assignment(JobNeeds job, const RoundLimits& most, const Network& network) : job_(std::move(job)) {
  const RoundLimits limits = wanted_limits(job_, most);
  Sweep sweep(job_.needs, limits.send_bytes);
  sweep.run();
  obstacle_ = sweep.obstacle;
  if (!obstacle_.empty()) return;
  units_ = std::move(sweep.units);
  std::vector<uint64_t> signatures = std::move(sweep.signatures);
  find_shares(signatures);
  // Where the bytes that ranks need are not spread evenly, more of a unit may be sent than was thought.
  constexpr int kMostTimes = 16;
  for (int i = 0; i < kMostTimes && obstacle_.empty() && split_large_units(limits, signatures); ++i) {
    find_shares(signatures);
  }
  if (!obstacle_.empty()) return;
  choose_owners(signatures);
  relays_ = relays_pay(network);
  choose_rounds(limits);
}

void Assignment::find_shares(std::vector<uint64_t>& signatures) {
  // Twice through all needs: to count, and to fill in.
  first_share_.assign(units_.size() + 1, 0);
  std::vector<int64_t> bytes(units_.size(), 0);
  std::vector<size_t> touched;
  for (const bool counts : {true, false}) {
    if (!counts) {
      std::partial_sum(first_share_.begin(), first_share_.end(), first_share_.begin());
      shares_.resize(first_share_.back());
    }
    for (size_t index = 0; index < job_.needs.size(); ++index) {
      const Need& need = job_.needs[index].need;
      touched.clear();
      auto unit = units_.begin();
      for (const NeededBox& box : need.boxes()) {
        // The first unit that ends behind the box's first byte. Boxes begin in ascending order.
        unit = std::lower_bound(unit, units_.end(), box, [](const Unit& a, const NeededBox& b) {
          return a.file < b.file || (a.file == b.file && a.end <= b.begin);
        });
        int64_t found = 0;
        for (auto next = unit; next != units_.end() && next->file == box.file && next->begin < box.end; ++next) {
          const int64_t of_box = need.bytes_within(box, next->begin, next->end);
          if (of_box == 0) continue;
          found += of_box;
          const auto number = static_cast<size_t>(next - units_.begin());
          if (bytes[number] == 0) touched.push_back(number);
          bytes[number] += of_box;
        }
        if (found != need.bytes_within(box, box.begin, box.end)) throw std::logic_error("units leave out needed bytes");
      }
      for (const size_t number : touched) {
        if (bytes[number] > std::numeric_limits<uint32_t>::max()) obstacle_ = "a rank needs the same bytes too often";
        if (counts) {
          ++first_share_[number + 1];
        } else {
          // The first share of a unit moves on while they are filled in, and is set back below.
          shares_[first_share_[number]++] = {static_cast<uint32_t>(index), static_cast<uint32_t>(bytes[number])};
        }
        bytes[number] = 0;
      }
    }
  }
  for (size_t i = units_.size(); i > 0; --i) first_share_[i] = first_share_[i - 1];
  first_share_[0] = 0;
  drop_gaps(signatures);
}

bool Assignment::split_large_units(const RoundLimits& limits, std::vector<uint64_t>& signatures) {
  std::vector<Unit> units;
  std::vector<uint64_t> of_units;
  for (size_t i = 0; i < units_.size(); ++i) {
    const Unit& unit = units_[i];
    const auto [first, last] = shares(i);
    int64_t sent = 0;
    int64_t received = 0;  // a rank may have several needs
    for (const Share* share = first; share != last; ++share) {
      sent += share->bytes * static_cast<int64_t>(job_.needs[share->need].ranks.size());
      received += share->bytes;
    }
    const int64_t pieces = std::max((sent - 1) / limits.send_bytes + 1, (received - 1) / limits.receive_bytes + 1);
    const int64_t size = unit.end - unit.begin;
    int64_t from = unit.begin;
    for (int64_t piece = 1; piece <= pieces; ++piece) {
      int64_t to = unit.end;
      if (piece < pieces) {
        to = unit.begin + size / pieces * piece + size % pieces * piece / pieces;
        // Where the coarsest box has the end of an element.
        int64_t begin = 0;
        int64_t grain = 1;
        for (const Share* share = first; share != last; ++share) {
          job_.needs[share->need].need.each_within(unit.file, to, to + 1, [&](const NeededBox& box) {
            if (box.grain > grain) std::tie(begin, grain) = std::pair(box.begin, int64_t{box.grain});
          });
        }
        if (grain > 1) to -= (to - begin) % grain;
      }
      if (to <= from) continue;
      units.push_back({unit.file, 0, from, to, 0});
      of_units.push_back(signatures[i]);
      from = to;
    }
  }
  const bool has_split = units.size() > units_.size();
  if (has_split) {
    units_ = std::move(units);
    signatures = std::move(of_units);
  }
  return has_split;
}

void Assignment::drop_gaps(std::vector<uint64_t>& signatures) {
  size_t kept = 0;
  for (size_t i = 0; i < units_.size(); ++i) {
    if (first_share_[i] == first_share_[i + 1]) continue;
    units_[kept] = units_[i];
    signatures[kept] = signatures[i];
    first_share_[kept++] = first_share_[i];
  }
  first_share_[kept] = first_share_[units_.size()];
  first_share_.resize(kept + 1);
  units_.resize(kept);
  signatures.resize(kept);
}

int64_t Assignment::bytes_to_read(size_t unit) const {
  const auto [begin, end] = shares(unit);
  int64_t bytes = 0;
  for (const Share* share = begin; share != end; ++share) bytes += share->bytes;
  return std::min(bytes, units_[unit].end - units_[unit].begin);
}

void Assignment::choose_owners(const std::vector<uint64_t>& signatures) {
  read_bytes_.assign(job_.nodes.size(), 0);
  std::vector<int64_t> node_bytes(job_.nodes.size(), 0);
  std::vector<int64_t> node_before(job_.nodes.size(), 0);
  for (size_t rank = 0; rank < job_.nodes.size(); ++rank) node_before[job_.nodes[rank]] += job_.read_before[rank];
  int64_t total = 0;
  for (size_t i = 0; i < units_.size(); ++i) total += bytes_to_read(i);
  const auto ranks = static_cast<int64_t>(job_.nodes.size());
  const int64_t most_block = std::clamp(total / (kBlocksPerRank * ranks), kLeastUnit, kMostBlock);
  // The needs that have bytes of a unit, in ascending order.
  const auto needs_of = [this](size_t unit) {
    std::vector<uint32_t> needs;
    const auto [first, last] = shares(unit);
    for (const Share* share = first; share != last; ++share) needs.push_back(share->need);
    return needs;
  };
  for (size_t begin = 0; begin < units_.size();) {
    std::vector<uint32_t> candidates = needs_of(begin);  // have bytes of each unit of the block
    int64_t bytes = bytes_to_read(begin);
    size_t end = begin + 1;
    for (; end < units_.size() && units_[end].file == units_[begin].file && signatures[end] == signatures[begin] &&
           bytes + bytes_to_read(end) <= most_block;
         ++end) {
      const std::vector<uint32_t> next = needs_of(end);
      std::vector<uint32_t> both;
      std::set_intersection(candidates.begin(), candidates.end(), next.begin(), next.end(), std::back_inserter(both));
      if (both.empty()) break;  // rows are longer than units, or small pieces have other neighbours
      candidates = std::move(both);
      bytes += bytes_to_read(end);
    }
    bool found = false;
    uint32_t owner = 0;
    // What was read before this exchange decides between equals alone: while some rank made up for that, all others
    // would wait for it.
    const auto load = [&](uint32_t of) {
      const uint32_t node = job_.nodes[of];
      return std::tuple(node_bytes[node], node_before[node], read_bytes_[of], job_.read_before[of], of);
    };
    for (const uint32_t need : candidates) {
      const CommonNeed& common = job_.needs[need];
      for (const Group& group : common.groups) {
        if (found && node_bytes[group.node] > node_bytes[job_.nodes[owner]]) continue;
        for (uint32_t i = group.begin; i < group.end; ++i) {
          if (!found || load(common.ranks[i]) < load(owner)) owner = common.ranks[i];
          found = true;
        }
      }
    }
    read_bytes_[owner] += bytes;
    node_bytes[job_.nodes[owner]] += bytes;
    for (; begin < end; ++begin) units_[begin].owner = owner;
  }
}

bool Assignment::relays_pay(const Network& network) const {
  Volume direct;
  Volume relayed;
  relayed.rounds = kRelayRounds;
  for (size_t i = 0; i < units_.size(); ++i) {
    const auto [first, last] = shares(i);
    for (const Share* share = first; share != last; ++share) {
      for (const Group& group : job_.needs[share->need].groups) {
        if (group.node == job_.nodes[units_[i].owner]) continue;
        const int64_t bytes = share->bytes;
        direct.between_nodes += bytes * group.size();
        relayed.between_nodes += bytes;
        relayed.within_nodes += bytes * (group.size() - 1);
      }
    }
  }
  const auto ranks = static_cast<int64_t>(job_.nodes.size());
  const int64_t nodes = 1 + *std::max_element(job_.nodes.begin(), job_.nodes.end());
  return seconds(network, relayed, ranks, nodes) < seconds(network, direct, ranks, nodes);
}

Traffic Assignment::traffic() const {
  const size_t ranks = job_.nodes.size();
  Traffic traffic{std::vector<int64_t>(ranks, 0), std::vector<int64_t>(ranks, 0), 0};
  for (size_t i = 0; i < units_.size(); ++i) {
    const uint32_t owner = units_[i].owner;
    const auto [first, last] = shares(i);
    for (const Share* share = first; share != last; ++share) {
      const auto send = [&, bytes = int64_t{share->bytes}](uint32_t from, uint32_t to) {
        if (from == to) return;
        traffic.sent[from] += bytes;
        traffic.received[to] += bytes;
        if (job_.nodes[from] != job_.nodes[to]) traffic.between_nodes += bytes;
      };
      const CommonNeed& common = job_.needs[share->need];
      for (const Group& group : common.groups) {
        const std::optional<uint32_t> by = relay(units_[i], common, group);
        if (by) send(owner, *by);
        for (uint32_t at = group.begin; at < group.end; ++at) send(by.value_or(owner), common.ranks[at]);
      }
    }
  }
  return traffic;
}

}  // namespace dcp_fast::exchange
