// Who reads what, and when: the decision that all ranks of a job come to from the same needs.
//
//   1. The files' bytes that any rank needs are cut into units, at the borders of what ranks need and of their boxes.
//   2. Neighbouring units that the same ranks need make up a block. Its owner, which reads it, is one of the ranks that
//      need bytes of each of its units: on the node that has least to read as yet, the rank that has least to read. Of
//      equals it is the one that had least to read in the exchanges before. Of many small exchanges each has too few
//      blocks for all ranks, but each rank has its turn.
//   3. Of ranks of another node that need the same bytes, one gets them from the owner, and is their relay: it passes
//      them on to the others kRelayRounds later. Where that saves too little (cost.h), all get them from the owner.
//   4. Units are sent in rounds. Each round takes the next units of every owner, as many as fit into the memory that
//      each rank has for what it sends and receives in a round, in that round and in the one of their relays. Where
//      there are few bytes, rounds are smaller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "exchange/cost.h"
#include "exchange/job_needs.h"

namespace dcp_fast::exchange {

// A round is packed while the last one is under way, so that what a relay has received goes into the next but one.
inline constexpr uint32_t kRelayRounds = 2;

// Memory of each rank for one round.
struct RoundLimits {
  int64_t send_bytes = 0;
  int64_t receive_bytes = 0;
};

struct Unit {
  uint32_t file = 0;
  uint32_t owner = 0;  // a rank
  int64_t begin = 0;
  int64_t end = 0;
  uint32_t round = 0;  // in which the owner sends it
  uint32_t turn = 0;   // tells which rank of a node is the relay
};

// Of a unit: how many of its bytes a common need has.
struct Share {
  uint32_t need = 0;
  uint32_t bytes = 0;
};

// Payload bytes that go over the network; what a rank keeps for itself does not.
struct Traffic {
  std::vector<int64_t> sent;      // by rank
  std::vector<int64_t> received;  // by rank
  int64_t between_nodes = 0;      // of all that is sent
};

class Assignment {
 public:
  // The files of the needs have the numbers that all ranks have for them. Rounds may be smaller than the limits. Throws
  // std::bad_alloc.
  Assignment(JobNeeds job, const RoundLimits& most, const Network& network = {});

  // Why nothing can be shared; empty if it can.
  const std::string& obstacle() const { return obstacle_; }

  // Ascending by file and position.
  const std::vector<Unit>& units() const { return units_; }
  std::pair<const Share*, const Share*> shares(size_t unit) const {
    return {shares_.data() + first_share_[unit], shares_.data() + first_share_[unit + 1]};
  }
  const JobNeeds& job() const { return job_; }
  uint32_t rounds() const { return static_cast<uint32_t>(first_in_round_.size()) - 1; }
  // The units of a round, by owner, and ascending for each.
  std::pair<const uint32_t*, const uint32_t*> units_of_round(uint32_t round) const {
    return {order_.data() + first_in_round_[round], order_.data() + first_in_round_[round + 1]};
  }
  // The rank that passes a unit's bytes on to a group of ranks; nothing if the owner sends them to all of the group.
  std::optional<uint32_t> relay(const Unit& unit, const CommonNeed& common, const Group& group) const {
    if (!relays_ || group.size() == 1 || group.node == job_.nodes[unit.owner]) return std::nullopt;
    return common.ranks[group.begin + unit.turn % group.size()];
  }
  // How many bytes each rank reads, as far as that can be told without the storage's own costs.
  const std::vector<int64_t>& read_bytes() const { return read_bytes_; }
  // Of all rounds together.
  Traffic traffic() const;

 private:
  class Sweep;
  class Rounds;

  void find_shares(std::vector<uint64_t>& signatures);
  // Cuts units of which more is sent or received than a round has room for. Returns whether there were any.
  bool split_large_units(const RoundLimits& limits, std::vector<uint64_t>& signatures);
  // Removes units that lie between the rows of boxes, of which nobody needs anything.
  void drop_gaps(std::vector<uint64_t>& signatures);
  void choose_owners(const std::vector<uint64_t>& signatures);
  // Whether relays save more time than they take.
  bool relays_pay(const Network& network) const;
  void choose_rounds(const RoundLimits& limits);
  // Of a unit's bytes, those that any rank needs, and no fewer.
  int64_t bytes_to_read(size_t unit) const;

  JobNeeds job_;
  bool relays_ = true;
  std::string obstacle_;
  std::vector<Unit> units_;
  std::vector<Share> shares_;
  std::vector<size_t> first_share_;  // of each unit, and an end
  std::vector<int64_t> read_bytes_;
  std::vector<uint32_t> order_;
  std::vector<size_t> first_in_round_{0};
};

}  // namespace dcp_fast::exchange
