// The ranks that share this machine, and its page cache.
#pragma once

#include <cstdint>
#include <string>

namespace dcp_fast::transfer {

// This process among those that were started together on this machine.
struct Node {
  int ranks = 1;
  int rank = 0;  // less than `ranks`
};

// As LOCAL_WORLD_SIZE and LOCAL_RANK have it, which torchrun sets.
Node node_of_this_process();

// How much memory of the machine the page cache may fill, by what is available and what the control groups (version 1
// or 2) of the process allow. `root`: what stands for "/".
int64_t room_for_page_cache(const std::string& root = "");

// Whether ranks of a node are better off if they leave what they read in the page cache for each other. They are if
// they cannot all need other records, and if the page cache has room. A rank that needs what no other one does reads it
// faster past the page cache. `bytes`: of the records that this rank needs, as each of the others is thought to;
// `bytes_stored`: of all records of the same tensors.
bool shares_page_cache(const Node& node, double bytes, double bytes_stored, int64_t room);

}  // namespace dcp_fast::transfer
