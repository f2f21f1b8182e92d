// How long an exchange takes, as far as that decides which way bytes go to other nodes.
//
// Either the rank that reads them sends them to every rank that needs them, or to one rank of each node, which passes
// them on to the others two rounds later. The second way sends less between nodes, more within them, and takes two
// rounds more.
#pragma once

#include <cstdint>

namespace dcp_fast::exchange {

// Coarse, and the same on all ranks: where the decision is close, both ways take about as long.
struct Network {
  double node_bytes_per_second = 3e9;     // into a node and out of it, for all of its ranks together
  double within_bytes_per_second = 1e10;  // between the ranks of a node, likewise
  double seconds_per_message = 1e-5;      // in each round each rank sends one to each other
};

// What is sent, by all ranks together.
struct Volume {
  int64_t between_nodes = 0;  // bytes
  int64_t within_nodes = 0;
  int64_t rounds = 0;
};

inline double seconds(const Network& network, const Volume& volume, int64_t ranks, int64_t nodes) {
  const auto of_node = [nodes](int64_t bytes) { return static_cast<double>(bytes) / static_cast<double>(nodes); };
  return of_node(volume.between_nodes) / network.node_bytes_per_second +
         of_node(volume.within_nodes) / network.within_bytes_per_second +
         static_cast<double>(volume.rounds * (ranks - 1)) * network.seconds_per_message;
}

}  // namespace dcp_fast::exchange
