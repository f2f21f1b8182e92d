// A hash of a number.
#pragma once

#include <cstdint>

namespace dcp_fast::exchange {

inline uint64_t mixed(uint64_t number) {
  number = (number + 1) * 0x9e3779b97f4a7c15U;
  number = (number ^ number >> 32) * 0xd6e8feb86659fd93U;
  return number ^ number >> 32;
}

}  // namespace dcp_fast::exchange
