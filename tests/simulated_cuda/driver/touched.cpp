#include "driver/touched.h"

#include <algorithm>
#include <vector>

namespace simcuda {

namespace {

uint64_t ones(uint64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

}  // namespace

TouchedBytes::Bits& TouchedBytes::bits_of(uint64_t chunk) {
  Recent& recent = recent_[chunk % kRecent];
  if (recent.chunk != chunk) {
    std::unique_ptr<Bits>& bits = chunks_[chunk];
    if (bits == nullptr) bits = std::make_unique<Bits>();
    recent = {chunk, bits.get()};
  }
  return *recent.bits;
}

void TouchedBytes::add(uint64_t address, size_t bytes) {
  while (bytes > 0) {
    const uint64_t offset = address % kChunk;
    const uint64_t bit = offset % kWordBits;
    const uint64_t count = std::min<uint64_t>(bytes, kWordBits - bit);
    bits_of(address / kChunk)[offset / kWordBits] |= ones(count) << bit;
    address += count;
    bytes -= count;
  }
}

Intervals TouchedBytes::intervals() const {
  std::vector<uint64_t> order;
  order.reserve(chunks_.size());
  for (const auto& [chunk, bits] : chunks_) order.push_back(chunk);
  std::sort(order.begin(), order.end());

  Intervals result;
  const auto append = [&](uint64_t begin, uint64_t end) {
    if (!result.empty() && result.back().end == begin) {
      result.back().end = end;
    } else {
      result.push_back({begin, end});
    }
  };
  for (const uint64_t chunk : order) {
    const Bits& bits = *chunks_.at(chunk);
    for (size_t index = 0; index < bits.size(); ++index) {
      const uint64_t word = bits[index];
      const uint64_t base = chunk * kChunk + index * kWordBits;
      if (word == ~uint64_t{0}) {
        append(base, base + kWordBits);
        continue;
      }
      for (uint64_t bit = 0; bit < kWordBits && word >> bit != 0; ++bit) {
        if ((word >> bit & 1) != 0) append(base + bit, base + bit + 1);
      }
    }
  }
  return result;
}

}  // namespace simcuda
