// How many processor cores this process may keep busy.
#pragma once

#include <string>

namespace dcp_fast::transfer {

// The cores that the process may run on, but no more than its share of the machine's cores and of what its control
// groups (version 1 or 2) give time for. LOCAL_WORLD_SIZE, which torchrun sets, tells how many processes share these.
// Control groups are asked once. At least 1.
int usable_cores();

// What the control groups of a process allow, rounded up; 0 without a limit. `root`: what stands for "/".
int quota_of_control_groups(const std::string& root = "");

}  // namespace dcp_fast::transfer
