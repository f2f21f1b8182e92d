// Vector clocks: what is known to have happened before what. An agent is a stream; its n-th piece of work has epoch n.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simcuda {

using Agent = size_t;

class VectorClock {
 public:
  uint64_t at(Agent agent) const { return agent < epochs_.size() ? epochs_[agent] : 0; }
  bool includes(Agent agent, uint64_t epoch) const { return at(agent) >= epoch; }

  // Learns all that the other clock knows.
  void join(const VectorClock& other) {
    if (epochs_.size() < other.epochs_.size()) epochs_.resize(other.epochs_.size());
    for (size_t agent = 0; agent < other.epochs_.size(); ++agent) {
      epochs_[agent] = std::max(epochs_[agent], other.epochs_[agent]);
    }
  }

  uint64_t advance(Agent agent) {
    if (epochs_.size() <= agent) epochs_.resize(agent + 1);
    return ++epochs_[agent];
  }

 private:
  std::vector<uint64_t> epochs_;
};

}  // namespace simcuda
