// When units are sent.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "exchange/assignment.h"

namespace dcp_fast::exchange {

// Fills one round after another. What relays pass on is counted in the round in which they do.
class Assignment::Rounds {
 public:
  Rounds(Assignment& assignment, const RoundLimits& limits)
      : assignment_(assignment), limits_(limits), later_limits_(limits), read_(ranks(), 0) {
    for (Load& load : loads_) load = {std::vector<int64_t>(ranks(), 0), std::vector<int64_t>(ranks(), 0), false};
    leave_room_for_owners();
  }

  void begin(uint32_t round) {
    round_ = round;
    std::fill(read_.begin(), read_.end(), 0);
    takes_any_ = false;
    Load& later = load_of(round_ + kRelayRounds);
    std::fill(later.sent.begin(), later.sent.end(), 0);
    std::fill(later.received.begin(), later.received.end(), 0);
    later.has_relays = false;
  }

  // Takes a unit if there is room for it. A round for which there is nothing yet takes any.
  bool take(uint32_t index, uint32_t turn) {
    Unit& unit = assignment_.units_[index];
    unit.round = round_;
    unit.turn = turn;
    const bool any = !takes_any_ && !load_of(round_).has_relays;
    const int64_t to_read = assignment_.bytes_to_read(index);
    if (!any && read_[unit.owner] + to_read > limits_.send_bytes) return false;
    const size_t added = add(index, any);
    if (added < kAll) {
      remove(index, added);
      return false;
    }
    read_[unit.owner] += to_read;
    takes_any_ = true;
    return true;
  }

  // Whether something is passed on in the next round, or in the one after it.
  bool has_relays() const { return load_of(round_ + 1).has_relays || load_of(round_ + kRelayRounds).has_relays; }

 private:
  static constexpr size_t kAll = std::numeric_limits<size_t>::max();

  // Of one round, by rank.
  struct Load {
    std::vector<int64_t> sent;
    std::vector<int64_t> received;
    bool has_relays = false;
  };

  size_t ranks() const { return assignment_.job_.nodes.size(); }
  Load& load_of(uint32_t round) { return loads_[round % (kRelayRounds + 1)]; }
  const Load& load_of(uint32_t round) const { return loads_[round % (kRelayRounds + 1)]; }

  // If relays filled up a round, owners could send nothing in it. They get as much of it as they have of all bytes.
  void leave_room_for_owners() {
    double all = 0;
    double relayed = 0;
    int64_t most_sent = 0;  // of one unit, by a relay
    int64_t most_received = 0;
    for (size_t i = 0; i < assignment_.units_.size(); ++i) {
      int64_t sent = 0;
      int64_t received = 0;
      const auto [first, last] = assignment_.shares(i);
      for (const Share* share = first; share != last; ++share) {
        const CommonNeed& common = assignment_.job_.needs[share->need];
        all += static_cast<double>(share->bytes) * static_cast<double>(common.ranks.size());
        received += share->bytes;
        uint32_t most = 0;
        for (const Group& group : common.groups) {
          if (!assignment_.relay(assignment_.units_[i], common, group)) continue;
          relayed += static_cast<double>(share->bytes) * (group.size() - 1);
          most = std::max(most, group.size() - 1);
        }
        sent += int64_t{share->bytes} * most;
      }
      most_sent = std::max(most_sent, sent);
      most_received = std::max(most_received, received);
    }
    const double part = all > 0 ? relayed / all : 0;
    const auto room = [part](int64_t limit, int64_t least) {
      return std::min(limit, std::max(least, static_cast<int64_t>(part * static_cast<double>(limit))));
    };
    later_limits_ = {room(limits_.send_bytes, most_sent), room(limits_.receive_bytes, most_received)};
  }

  // Adds a unit to the loads, one group of ranks after another, until it exceeds a limit. Returns how many groups were
  // added, or kAll.
  size_t add(uint32_t index, bool any) {
    size_t groups = 0;
    bool fits = true;
    bool has_relays = false;
    each_group(index,
               [&](const Share& share, const CommonNeed& common, const Group& group, std::optional<uint32_t> by) {
                 fits = change(index, share.bytes, common, group, by) || any;
                 has_relays = has_relays || by;
                 ++groups;
                 return fits;
               });
    if (!fits) return groups;
    if (has_relays) load_of(round_ + kRelayRounds).has_relays = true;
    return kAll;
  }

  void remove(uint32_t index, size_t groups) {
    each_group(index,
               [&](const Share& share, const CommonNeed& common, const Group& group, std::optional<uint32_t> by) {
                 if (groups == 0) return false;
                 change(index, -int64_t{share.bytes}, common, group, by);
                 --groups;
                 return true;
               });
  }

  // Calls `function` for each group of ranks that need bytes of a unit, and with its relay, until it returns false.
  template <typename Function>
  void each_group(uint32_t index, const Function& function) const {
    const auto [first, last] = assignment_.shares(index);
    for (const Share* share = first; share != last; ++share) {
      const CommonNeed& common = assignment_.job_.needs[share->need];
      for (const Group& group : common.groups) {
        if (!function(*share, common, group, assignment_.relay(assignment_.units_[index], common, group))) return;
      }
    }
  }

  // Adds what one group gets. Returns whether all limits are kept.
  bool change(uint32_t index, int64_t bytes, const CommonNeed& common, const Group& group, std::optional<uint32_t> by) {
    Load& now = load_of(round_);
    const uint32_t owner = assignment_.units_[index].owner;
    const uint32_t* const begin = common.ranks.data() + group.begin;
    const uint32_t* const end = common.ranks.data() + group.end;
    if (!by) {
      int64_t most = 0;
      for (const uint32_t* rank = begin; rank != end; ++rank) most = std::max(most, now.received[*rank] += bytes);
      now.sent[owner] += bytes * group.size();
      return most <= limits_.receive_bytes && now.sent[owner] <= limits_.send_bytes;
    }
    Load& later = load_of(round_ + kRelayRounds);
    const int64_t most_now = now.received[*by] += bytes;
    now.sent[owner] += bytes;
    int64_t most_later = 0;
    for (const uint32_t* rank = begin; rank != end; ++rank) {
      if (*rank != *by) most_later = std::max(most_later, later.received[*rank] += bytes);
    }
    later.sent[*by] += bytes * (group.size() - 1);
    return most_now <= limits_.receive_bytes && now.sent[owner] <= limits_.send_bytes &&
           most_later <= later_limits_.receive_bytes && later.sent[*by] <= later_limits_.send_bytes;
  }

  Assignment& assignment_;
  const RoundLimits limits_;
  RoundLimits later_limits_;  // of what relays pass on
  Load loads_[kRelayRounds + 1];
  std::vector<int64_t> read_;
  uint32_t round_ = 0;
  bool takes_any_ = false;
};

void Assignment::choose_rounds(const RoundLimits& limits) {
  const size_t ranks = job_.nodes.size();
  std::vector<std::vector<uint32_t>> queues(ranks);
  for (size_t i = 0; i < units_.size(); ++i) queues[units_[i].owner].push_back(static_cast<uint32_t>(i));
  std::vector<size_t> next(ranks, 0);
  std::vector<uint32_t> turns(job_.needs.size(), 0);
  Rounds filling(*this, limits);
  for (bool goes_on = !units_.empty(); goes_on;) {
    const uint32_t round = rounds();
    filling.begin(round);
    std::vector<bool> is_full(ranks, false);
    const size_t before = order_.size();
    // Each pass takes one unit of each owner that has room. The first owner changes, as it finds most room.
    for (bool takes = true; takes;) {
      takes = false;
      for (size_t i = 0; i < ranks; ++i) {
        const size_t owner = (i + round) % ranks;
        if (is_full[owner] || next[owner] == queues[owner].size()) continue;
        const uint32_t unit = queues[owner][next[owner]];
        // The ranks of a node that have a need in common pass on as many units each.
        uint32_t& turn = turns[shares(unit).first->need];
        if (!filling.take(unit, turn)) {
          is_full[owner] = true;
          continue;
        }
        ++turn;
        order_.push_back(unit);
        ++next[owner];
        takes = true;
      }
    }
    std::sort(order_.begin() + static_cast<std::ptrdiff_t>(before), order_.end(),
              [this](uint32_t a, uint32_t b) { return std::tie(units_[a].owner, a) < std::tie(units_[b].owner, b); });
    first_in_round_.push_back(order_.size());
    goes_on = order_.size() < units_.size() || filling.has_relays();
  }
}

}  // namespace dcp_fast::exchange
