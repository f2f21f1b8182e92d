#include "io/read_clock.h"

#include <algorithm>

namespace dcp_fast::io {

// Threads read the time before they get the lock, so calls may come a little out of order. Time that was counted once
// is not counted again.

void ReadClock::enter(Time now) {
  const std::scoped_lock lock(mutex_);
  if (outstanding_++ == 0) busy_since_ = std::max(now, idle_since_);
}

void ReadClock::leave(Time begin, Time now) {
  const std::scoped_lock lock(mutex_);
  waiting_ += now - begin;
  idle_since_ = std::max(now, idle_since_);
  if (--outstanding_ == 0) reading_ += std::max(idle_since_ - busy_since_, Duration(0));
}

ReadClock::Duration ReadClock::reading() const {
  const std::scoped_lock lock(mutex_);
  return reading_;
}

ReadClock::Duration ReadClock::waiting() const {
  const std::scoped_lock lock(mutex_);
  return waiting_;
}

}  // namespace dcp_fast::io
