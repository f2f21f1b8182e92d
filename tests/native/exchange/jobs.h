// Jobs of many ranks in one process, and what must hold for how they share reads.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "doctest/doctest.h"
#include "exchange/assignment.h"

namespace dcp_fast::testing {

inline constexpr int64_t kMiB = 1 << 20;
inline constexpr int64_t kRecordGap = 1345;  // of headers between payloads

inline box::Loops rows(int64_t bytes) { return {{bytes, 1, 1}}; }
inline box::Loops columns(int64_t row_count, int64_t row_bytes, int64_t column_bytes) {
  return {{row_count, row_bytes, column_bytes}, {column_bytes, 1, 1}};
}

struct Job {
  std::vector<exchange::Need> needs;
  exchange::Ranks ranks;

  // Every rank of its own need.
  void each_its_own(int64_t nodes = 1) {
    for (uint32_t i = 0; i < needs.size(); ++i) {
      ranks.needs.push_back(i);
      ranks.nodes.push_back(i / (static_cast<int64_t>(needs.size()) / nodes));
    }
    for (exchange::Need& need : needs) need.number_files({0});
  }
};

// Tensors of a checkpoint of one file, of which each rank needs what `loops` says.
template <typename Add>
Job job_of(size_t needs, int64_t tensors, int64_t tensor_bytes, const Add& add) {
  Job job;
  for (size_t rank = 0; rank < needs; ++rank) {
    exchange::Need need({{"file", tensors * (tensor_bytes + kRecordGap), 0}});
    for (int64_t i = 0; i < tensors; ++i) add(need, rank, i * (tensor_bytes + kRecordGap));
    job.needs.push_back(std::move(need));
  }
  return job;
}

// As if rounds cost nothing: bytes always go to other nodes once.
inline const exchange::Network kFreeRounds{3e9, 1e10, 0};

// As if they cost more than any bytes.
inline const exchange::Network kDearRounds{3e9, 1e10, 1e9};

inline exchange::Assignment assign(const Job& job, const exchange::RoundLimits& limits,
                                   const exchange::Network& network = kFreeRounds) {
  return exchange::Assignment(exchange::needs_of_job(job.needs, job.ranks, 0), limits, network);
}

inline int64_t bytes_of(const exchange::Need& need) {
  int64_t bytes = 0;
  for (const exchange::NeededBox& box : need.boxes()) bytes += need.bytes_within(box, box.begin, box.end);
  return bytes;
}

// Calls `function(bytes, from, to, round)` for what ranks send each other, and what owners keep for themselves.
template <typename Function>
void each_message(const exchange::Assignment& assignment, size_t index, const Function& function) {
  const exchange::Unit& unit = assignment.units()[index];
  const auto [first, last] = assignment.shares(index);
  for (const exchange::Share* share = first; share != last; ++share) {
    const exchange::CommonNeed& common = assignment.job().needs[share->need];
    for (const exchange::Group& group : common.groups) {
      const std::optional<uint32_t> relay = assignment.relay(unit, common, group);
      if (relay) function(share->bytes, unit.owner, *relay, unit.round);
      for (uint32_t i = group.begin; i < group.end; ++i) {
        const uint32_t rank = common.ranks[i];
        if (!relay) function(share->bytes, unit.owner, rank, unit.round);
        if (relay && rank != *relay) function(share->bytes, *relay, rank, unit.round + exchange::kRelayRounds);
      }
    }
  }
}

// What must hold for any assignment. Returns the bytes that are read.
inline int64_t check(const Job& job, const exchange::Assignment& assignment, const exchange::RoundLimits& limits) {
  REQUIRE(assignment.obstacle().empty());
  const std::vector<exchange::CommonNeed>& needs = assignment.job().needs;
  const size_t ranks = job.ranks.needs.size();
  const auto& units = assignment.units();
  std::vector<int64_t> of_need(needs.size(), 0);
  for (size_t i = 0; i < units.size(); ++i) {
    const exchange::Unit& unit = units[i];
    if (i > 0) REQUIRE((units[i - 1].file < unit.file || units[i - 1].end <= unit.begin));
    bool owner_needs_it = false;
    const auto [begin, end] = assignment.shares(i);
    REQUIRE(begin != end);
    for (const exchange::Share* share = begin; share != end; ++share) {
      const auto& [need, of_ranks, groups] = needs[share->need];
      int64_t bytes = 0;
      need.each_within(unit.file, unit.begin, unit.end, [&, &need = need](const exchange::NeededBox& box) {
        bytes += need.bytes_within(box, unit.begin, unit.end);
        const auto cuts_an_element = [&](int64_t position) {
          return position > box.begin && position < box.end && (position - box.begin) % box.grain != 0;
        };
        REQUIRE((!cuts_an_element(unit.begin) && !cuts_an_element(unit.end)));
      });
      REQUIRE(bytes == share->bytes);
      of_need[share->need] += bytes;
      owner_needs_it = owner_needs_it || std::count(of_ranks.begin(), of_ranks.end(), unit.owner) == 1;
    }
    REQUIRE(owner_needs_it);
  }
  std::vector<int64_t> of_rank(ranks, 0);
  for (size_t i = 0; i < needs.size(); ++i) {
    REQUIRE(of_need[i] == bytes_of(needs[i].need));
    for (const uint32_t rank : needs[i].ranks) of_rank[rank] += of_need[i];
  }
  for (size_t rank = 0; rank < ranks; ++rank) REQUIRE(of_rank[rank] == bytes_of(job.needs[job.ranks.needs[rank]]));

  size_t seen = 0;
  std::vector<std::vector<int64_t>> sent(assignment.rounds(), std::vector<int64_t>(ranks, 0));
  std::vector<std::vector<int64_t>> received = sent;
  std::vector<int64_t> arrived(ranks, 0);
  int64_t most_sent = 0;  // of one unit
  int64_t most_received = 0;
  // Not REQUIRE for each message: there are millions.
  bool within_rounds = true;
  std::vector<int64_t> of_unit;  // by rank
  std::vector<int64_t> to;       // likewise
  for (uint32_t round = 0; round < assignment.rounds(); ++round) {
    const auto [begin, end] = assignment.units_of_round(round);
    seen += static_cast<size_t>(end - begin);
    for (const uint32_t* unit = begin; unit != end; ++unit) {
      REQUIRE(units[*unit].round == round);
      of_unit.assign(ranks, 0);
      to.assign(ranks, 0);
      each_message(assignment, *unit, [&](int64_t bytes, uint32_t from, uint32_t rank, uint32_t in_round) {
        within_rounds = within_rounds && in_round < sent.size();
        if (!within_rounds) return;
        sent[in_round][from] += bytes;
        received[in_round][rank] += bytes;
        arrived[rank] += bytes;
        most_sent = std::max(most_sent, of_unit[from] += bytes);
        most_received = std::max(most_received, to[rank] += bytes);
      });
    }
  }
  REQUIRE(within_rounds);
  REQUIRE(seen == units.size());
  REQUIRE(arrived == of_rank);  // everything, once
  for (uint32_t round = 0; round < assignment.rounds(); ++round) {
    // A unit that is larger than a round has one for itself.
    REQUIRE(*std::max_element(sent[round].begin(), sent[round].end()) <= std::max(limits.send_bytes, most_sent));
    REQUIRE(*std::max_element(received[round].begin(), received[round].end()) <=
            std::max(limits.receive_bytes, most_received));
  }
  return std::accumulate(assignment.read_bytes().begin(), assignment.read_bytes().end(), int64_t{0});
}

inline double imbalance(const exchange::Assignment& assignment) {
  const std::vector<int64_t>& bytes = assignment.read_bytes();
  const auto most = static_cast<double>(*std::max_element(bytes.begin(), bytes.end()));
  return most * static_cast<double>(bytes.size()) /
         static_cast<double>(std::accumulate(bytes.begin(), bytes.end(), int64_t{0}));
}

inline const exchange::RoundLimits kLimits{32 * kMiB, 32 * kMiB};

}  // namespace dcp_fast::testing
