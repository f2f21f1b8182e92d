// How long a load was reading, over all its threads.
#pragma once

#include <chrono>
#include <mutex>

namespace dcp_fast::io {

class ReadClock {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::steady_clock::duration;

  // A request begins. One call of leave() ends it, and gets the time at which it began as well.
  void enter(Time now);
  void leave(Time begin, Time now);

  // The time in which at least one request was under way.
  Duration reading() const;
  // The sum of the times of all requests, even of those that ran side by side.
  Duration waiting() const;

 private:
  mutable std::mutex mutex_;
  int outstanding_ = 0;
  Time busy_since_;
  Time idle_since_;
  Duration reading_{0};
  Duration waiting_{0};
};

}  // namespace dcp_fast::io
