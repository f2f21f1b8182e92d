// How a load may use the machine, and who watches what it does.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>

#include "io/byte_source.h"
#include "io/read_clock.h"
#include "trace/recorder.h"

namespace dcp_fast::transfer {

struct Options {
  int threads = 0;                            // 0: as reader_threads says
  int64_t block_bytes = 0;                    // the most that one request reads; 0: as each byte source asks
  int64_t staging_bytes = 32 << 20;           // the most that the bounce buffers of all threads take together
  bool mapped = true;                         // false: what is read is used soon, and should stay in the cache
  std::shared_ptr<io::ReadClock> read_clock;  // of the whole load, whose stages and batches may overlap; may be null
  std::shared_ptr<trace::Recorder> recorder;  // null: no trace is wanted
  int64_t most_gap = std::numeric_limits<int64_t>::max();  // what may be read through, whatever a request costs

  // Counters from zero, whose requests the clock and the recorder learn of. The options must outlive them.
  io::IoCounters counters() const { return {{0}, {0}, read_clock.get(), recorder.get(), {0}, {0}}; }
};

// How many threads read: `wanted`, or if that is 0 one for each core that this process may use, up to 16. Each thread
// has one request under way, so there are at least `requests_at_once` of them.
int reader_threads(int wanted, int requests_at_once);

// What options come to: the bounce buffers of all threads, with a block each, take at most `staging_bytes`, unless one
// thread with the smallest block takes more.
struct Limits {
  int threads = 1;
  int64_t block_bytes = 0;  // of the largest requests

  // The most that one request reads of a source. It is less than `block_bytes` where the source asks for less.
  int64_t block_of(const io::Access& access) const;

  int64_t most_gap = std::numeric_limits<int64_t>::max();  // of Options
  bool source_decides = false;                             // of how large blocks are, within the limits
};
// `access`: of the source, or of all sources together.
Limits limits_of(const Options& options, const io::Access& access);

}  // namespace dcp_fast::transfer
