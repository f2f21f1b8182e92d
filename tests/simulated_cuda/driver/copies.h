// Copies and fills: what they may touch is checked, their order is recorded, and they go to a stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver/call.h"

namespace simcuda {

enum class Direction { kToDevice, kToHost, kOnDevice };

struct Transfer {
  Direction direction;
  uint64_t destination;
  uint64_t source;
  size_t bytes;
};

// Enqueues a copy. One from or to host memory that is not pinned is reported, and done before this returns.
void copy_asynchronously(Call& call, const Transfer& transfer, CUstream stream);
// Copies on the default stream and waits. Any host memory will do.
void copy_and_wait(Call& call, const Transfer& transfer);

void fill_asynchronously(Call& call, CUdeviceptr destination, unsigned char value, size_t bytes, CUstream stream);

}  // namespace simcuda
