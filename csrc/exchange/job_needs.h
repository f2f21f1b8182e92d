// What all ranks of a job need, sorted by who needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "exchange/need.h"

namespace dcp_fast::exchange {

struct Ranks {
  std::vector<uint32_t> needs;  // of each rank the index of its need
  std::vector<int64_t> nodes;   // of each rank what tells its node from others
  // Of each rank how much it was to read in earlier exchanges; empty: nothing. Jobs of one exchange leave it out.
  std::vector<int64_t> read_before = {};  // NOLINT(readability-redundant-member-init)
};

// Ranks of one node that need the same boxes.
struct Group {
  uint32_t node = 0;
  uint32_t begin = 0;  // among the ranks of a common need
  uint32_t end = 0;

  uint32_t size() const { return end - begin; }
};

// Boxes that the same ranks need.
struct CommonNeed {
  Need need;
  std::vector<uint32_t> ranks;  // by node, and ascending on each
  std::vector<Group> groups;    // by node
};

struct JobNeeds {
  // Every box that a rank needs is in one of its common needs, as often as the rank needs it.
  std::vector<CommonNeed> needs;
  std::vector<uint32_t> nodes;       // of each rank, counted from 0
  std::vector<int64_t> read_before;  // of each rank, in earlier exchanges
};

// `needs`: all different ones, after number_files(). The boxes of `own` keep their numbers.
JobNeeds needs_of_job(std::vector<Need> needs, const Ranks& ranks, uint32_t own);

}  // namespace dcp_fast::exchange
