// A hash that files cannot foresee: names and offsets come from them, and must not make a table slow by colliding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string_view>

namespace dcp_fast::metadata {

inline uint64_t mix(uint64_t a, uint64_t b) {
  // Rotations and multiplications by odd numbers lose nothing; the last steps are those of MurmurHash3.
  uint64_t x = (a ^ (b << 32 | b >> 32)) * 0x9e3779b97f4a7c15U + b;
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdU;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53U;
  return x ^ x >> 33;
}

inline uint64_t hash_seed() {
  static const uint64_t seed = [] {
    std::random_device device;
    return mix(device(), device());
  }();
  return seed;
}

inline uint64_t hash(std::string_view text) {
  uint64_t value = hash_seed() + text.size();
  size_t i = 0;
  for (; i + sizeof(uint64_t) <= text.size(); i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + i, sizeof word);
    value = mix(value, word);
  }
  uint64_t rest = 0;
  std::memcpy(&rest, text.data() + i, text.size() - i);
  return mix(value, rest);
}

}  // namespace dcp_fast::metadata
