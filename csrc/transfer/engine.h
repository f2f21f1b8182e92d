// Runs a transfer program: reads, slices and places, on host memory and on GPUs.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "cuda/pinned_ring.h"
#include "io/byte_source.h"
#include "transfer/options.h"
#include "transfer/program.h"
#include "transfer/reader.h"
#include "transfer/schedule.h"

namespace dcp_fast::transfer {

struct Stats {
  int64_t requests = 0;
  int64_t bytes_read = 0;
  int64_t bytes_placed = 0;
  int64_t bytes_mapped = 0;     // of those that were read
  int unmapped = 0;             // of io::IoCounters
  int64_t converted_items = 0;  // to another dtype on their way
};

// Where the bytes of the only source are on a device, if they are. Boxes for this device are taken from there, and the
// source is not asked for them.
struct Received {
  int device = kHost;
  cuda::DeviceAddress address = 0;
};

// What a load to GPUs needs. It may be empty if no box goes to one.
struct CudaTargets {
  cuda::PinnedRing* ring = nullptr;
  // Torch's current stream on each device: our first write waits for it, and it waits for our last one.
  std::map<int, cuda::StreamHandle> torch_streams;
  Received received{};
};

// Boxes by where they go, which may be placed in any order.
struct Boxes {
  std::vector<Piece> host;
  std::map<int, std::vector<Piece>> devices;
  int64_t bytes = 0;
  int64_t converted = 0;  // how many have a conversion

  void add(int device, Piece piece);
};

// Copies boxes out of sources whose access is chosen. What goes to GPUs may still be on its way when this returns.
// Throws as run_wave does, with what `attribute` adds.
Stats run_boxes(Boxes boxes, const io::ByteSources& sources, const Attribute& attribute, const Options& options,
                const CudaTargets& cuda, const std::function<bool()>& interrupted);

// How many bytes run_wave reads for boxes of the first wave on the host, gaps included, if it copies none from
// mappings. Opens files for their sizes. Throws Error(kIo), std::bad_alloc.
int64_t bytes_to_read(const Program& program, const Options& options);

// Copies all direct items of one wave. What goes to GPUs may still be on its way when this returns. Throws Error with
// `record` and `item` set where they are known, Interrupted, std::bad_alloc. Some destinations are then written and
// others are not, and no device writes any more.
Stats run_wave(const Program& program, int32_t wave, const Options& options, const CudaTargets& cuda,
               const std::function<bool()>& interrupted);

// Copies one program after another, each of one wave, without a pause between them. `placed` is called with the index
// of each, in order and on the calling thread, when torch's streams wait for all that it wrote. What `placed` enqueues
// on these streams is done before the program after the next one writes anything, so that two memories serve all
// programs in turns.
Stats run_programs(const std::vector<const Program*>& programs, const Options& options, const CudaTargets& cuda,
                   const std::function<bool()>& interrupted, const std::function<void(size_t)>& placed);

}  // namespace dcp_fast::transfer
