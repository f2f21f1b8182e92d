// Runs a transfer program: reads, slices and places, on host memory and on GPUs.
#pragma once

#include <cstdint>
#include <functional>
#include <map>

#include "cuda/staging.h"
#include "transfer/options.h"
#include "transfer/program.h"

namespace dcp_fast::transfer {

struct Stats {
  int64_t requests = 0;
  int64_t bytes_read = 0;
  int64_t bytes_placed = 0;
};

// What a load to GPUs goes through. Nothing is looked at unless a box goes to one.
struct CudaTargets {
  cuda::Staging* staging = nullptr;
  // Torch's current stream on each device: our first write waits for it, and it waits for our last one.
  std::map<int, cuda::StreamHandle> torch_streams;
};

// Copies all direct items of one wave. What goes to GPUs may still be on its way when this returns. Throws Error with
// `record` and `item` set where they are known, Interrupted, std::bad_alloc; some destinations are then written and
// others are not, and no device is writing any more.
Stats run_wave(const Program& program, int32_t wave, const Options& options, const CudaTargets& cuda,
               const std::function<bool()>& interrupted);

}  // namespace dcp_fast::transfer
