// How a load may use the machine, and who watches what it does.
#pragma once

#include <cstdint>
#include <memory>

#include "io/file.h"
#include "io/read_clock.h"
#include "trace/recorder.h"

namespace dcp_fast::transfer {

struct Options {
  int threads = 0;  // 0: as reader_threads says
  // The most that one request reads. Through the page cache 1, 2 and 4 MiB are alike; past it, a virtual disk took 1.00
  // s for 1.9 GB in 8 threads of 1 MiB and 0.80 s in 4 threads of 4 MiB.
  int64_t block_bytes = 4 << 20;
  int64_t staging_bytes = 32 << 20;  // the most that all threads' staging buffers take together
  io::IoMode mode = io::IoMode::kAuto;
  std::shared_ptr<io::ReadClock> read_clock;  // of the whole load, whose stages and batches may overlap; may be null
  std::shared_ptr<trace::Recorder> recorder;  // null: no trace is wanted

  // Counters from zero, whose requests the clock and the recorder learn of. The options must outlive them.
  io::IoCounters counters() const { return {{0}, {0}, read_clock.get(), recorder.get()}; }
};

// How many threads read where `wanted` asks for none: one for each core that this process may use, up to 16, and at
// least 4 past the page cache, where requests that are under way at once keep a disk busy.
int reader_threads(int wanted, bool any_direct);

// What options come to: threads * (block_bytes + alignment) <= staging_bytes, as far as one thread
// with the smallest block allows.
struct Limits {
  int threads = 1;
  int64_t block_bytes = 0;
};
Limits limits_of(const Options& options, bool any_direct);

// What a request costs beyond its bytes, expressed in bytes that could be read in the same time. Reads are joined
// across a gap when the gap is cheaper than a request. Measured: see benchmarks/README.md.
constexpr int64_t request_cost(io::IoMode mode) { return mode == io::IoMode::kDirect ? 256 << 10 : 8 << 10; }

}  // namespace dcp_fast::transfer
