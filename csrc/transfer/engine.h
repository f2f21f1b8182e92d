// Runs a transfer program: reads, slices and places on host memory.
#pragma once

#include <cstdint>
#include <functional>

#include "transfer/options.h"
#include "transfer/program.h"

namespace dcp_fast::transfer {

struct Stats {
  int64_t requests = 0;
  int64_t bytes_read = 0;
  int64_t bytes_placed = 0;
};

// Copies all direct items of one wave. Throws Error with `record` and `item` set where it is known, Interrupted,
// std::bad_alloc; some destinations are then written and others are not.
Stats run_wave(const Program& program, int32_t wave, const Options& options, const std::function<bool()>& interrupted);

}  // namespace dcp_fast::transfer
