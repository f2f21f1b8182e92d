// Random inputs that are the same on every run and with every standard library.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace dcp_fast::testing {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // Both ends included.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  size_t below(size_t bound) { return static_cast<size_t>(engine_() % bound); }
  bool chance(int percent) { return between(0, 99) < percent; }

  template <typename T>
  const T& pick(const std::vector<T>& choices) {
    return choices[below(choices.size())];
  }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }
  std::string bytes(size_t count) {
    std::string result(count, '\0');
    for (size_t i = 0; i < count; i += sizeof(uint64_t)) {
      const uint64_t word = engine_();
      std::memcpy(&result[i], &word, std::min(sizeof(word), count - i));
    }
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace dcp_fast::testing
