// Events: marks in the queues of streams.
#pragma once

#include <memory>

#include "driver/streams.h"

namespace simcuda {

enum class Timing { kEnabled, kDisabled };

struct Event {
  Context& context;
  Timing timing;
  // Of the latest record; null before the first.
  std::shared_ptr<Completion> completion;
  VectorClock clock;
};

}  // namespace simcuda
