// Race detection by vector clocks: two accesses to the same memory, one of them a write, must be ordered by streams,
// events or a host that waited. Whether they met in time this once does not matter.
//
// 1. Every piece of device work carries the clock of its stream at the time when it was enqueued. That clock includes
//    all that the host had waited for by then.
// 2. Host threads count as one. What they hand to each other is a matter for the thread sanitizer; here counts only
//    whether the host waited for the device.
// 3. Copies are recorded when they are enqueued, kernels when they have run, since only then is known what they
// touched.
// 4. What the host has waited for cannot race with anything that comes later, so it is forgotten.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "driver/intervals.h"
#include "driver/reports.h"
#include "driver/vector_clock.h"

namespace simcuda {

// A piece of device work, as far as order is concerned.
struct Work {
  Agent agent = 0;
  uint64_t epoch = 0;
  VectorClock clock;
  std::string label;

  bool happened_before(const VectorClock& other) const { return other.includes(agent, epoch); }
};

enum class Access { kRead, kWrite };

// The accesses to one allocation, or to one registered range of host memory, that something may still race with.
class History {
 public:
  struct Entry {
    std::shared_ptr<const Work> work;
    Access access = Access::kRead;
    Intervals intervals;
  };

 private:
  friend class RaceDetector;
  std::vector<Entry> entries_;
  uint64_t pruned_at_ = 0;  // the state of the detector's knowledge that entries were last compared with
};

class RaceDetector {
 public:
  explicit RaceDetector(Reports& reports) : reports_(reports) {}

  void enable(bool enabled) { enabled_ = enabled; }

  Agent add_agent();
  // The agent's number goes to another stream once the host has waited for all that the old one did.
  void retire_agent(Agent agent, uint64_t last_epoch);

  // What the host has waited for.
  const VectorClock& host_clock() const { return host_; }
  void host_waited_for(const VectorClock& clock);

  // Checks an access against the history that it becomes part of.
  void record(History& history, const std::shared_ptr<const Work>& work, Access access, Intervals intervals);
  // Checks what the host does itself with memory that copies use.
  void check_host(History& history, Access access, Interval range, const std::string& who);
  // Work that touched the memory and that the host has not waited for, or null.
  const Work* not_waited_for(History& history);

  // Between the launch of a kernel and the recording of what it did nothing is forgotten that may race with it.
  void kernel_launched(const std::shared_ptr<const Work>& work);
  void kernel_ended(const std::shared_ptr<const Work>& work);

 private:
  bool settled(const Work& work) const;
  void prune(History& history);
  void report(const History::Entry& earlier, Access access, const std::string& who, Interval where);

  Reports& reports_;
  bool enabled_ = true;
  VectorClock host_;
  uint64_t knowledge_ = 0;  // counts changes of what settled() depends on
  std::list<std::shared_ptr<const Work>> kernels_;

  struct Retired {
    Agent agent;
    uint64_t last_epoch;
  };
  std::vector<Retired> retired_;
  Agent next_agent_ = 0;
};

}  // namespace simcuda
