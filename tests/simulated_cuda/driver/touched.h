// Remembers which bytes a kernel touched: millions of small accesses, few intervals in the end.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "driver/intervals.h"

namespace simcuda {

class TouchedBytes {
 public:
  void add(uint64_t address, size_t bytes);
  Intervals intervals() const;

 private:
  // One bit for each byte of a chunk.
  static constexpr uint64_t kChunk = 64 << 10;
  static constexpr size_t kWordBits = 64;
  using Bits = std::array<uint64_t, kChunk / kWordBits>;

  // Threads take turns over a few chunks, so that these are found without a search.
  static constexpr size_t kRecent = 64;
  struct Recent {
    uint64_t chunk = ~uint64_t{0};
    Bits* bits = nullptr;
  };

  Bits& bits_of(uint64_t chunk);

  std::array<Recent, kRecent> recent_{};
  std::unordered_map<uint64_t, std::unique_ptr<Bits>> chunks_;
};

}  // namespace simcuda
