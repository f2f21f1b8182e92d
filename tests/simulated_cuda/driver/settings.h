// How the simulated machine behaves. Set by SIMCUDA_* environment variables when the library is loaded, and by
// simcuda_set later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simcuda {

struct Settings {
  int devices = 2;
  int driver_version = 12040;
  uint64_t seed = 1;

  double copy_gbps = 0;  // of the link between host and device in each direction; 0: as fast as the host copies
  double latency_seconds = 0;
  double jitter_seconds = 0;  // up to so much is added to each copy at random
  bool late = true;           // a copy touches host memory at its modelled end rather than at its start
  bool races = true;          // detect races and sources that change
  bool poison = true;         // fresh device memory is not zero; costs what the first touch of memory costs
  double pin_seconds_per_byte = 0;
  double compile_seconds = 0;  // of a module's text
  bool capturing = false;      // every stream says that it is being captured into a graph
  size_t memory_bytes = size_t{4096} << 20;

  static Settings from_environment();
  // False for a key that is unknown.
  bool set(const std::string& key, double value);
};

}  // namespace simcuda
