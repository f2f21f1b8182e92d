// Boxes for GPUs as units of work: each fills one slot, and enqueues its way to the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "cuda/slot.h"
#include "transfer/schedule.h"

namespace dcp_fast::transfer {

struct SlotTask {
  int device = 0;
  cuda::SlotPlan plan;
  // How the slot is filled. A piece's destination is its offset in the slot, until `place_at`.
  Schedule schedule;

  void place_at(std::byte* slot);
};

// Cuts the boxes of each device into what fits slots of `slot_bytes`. A box's destination is its address on the device.
// Tasks ascend by file and offset over all devices.
std::vector<SlotTask> make_slot_tasks(const std::map<int, std::vector<Piece>>& boxes,
                                      const std::vector<Policy>& policies, size_t slot_bytes);

}  // namespace dcp_fast::transfer
