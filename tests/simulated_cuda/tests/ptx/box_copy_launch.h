// Launches of the shipped kernel with what they have to do to memory, worked out vector by vector in plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/box_copy.h"
#include "ptx/interpreter.h"
#include "random.h"
#include "sparse_memory.h"

namespace simcuda::testing {

// The text that ships.
std::string box_copy_ptx();
extern const char* const kBoxCopyName;

// A box at a certain place of the slot.
struct Box {
  uint32_t source = 0;
  uint64_t destination = 0;
  uint32_t vectors = 0;
  uint32_t vector_bytes = 1;
  std::vector<dcp_fast::cuda::BoxDim> dims;  // outermost first; none: contiguous
};

// Some of its vectors.
struct Entry {
  size_t box = 0;
  uint32_t first = 0;
  uint32_t count = 0;
};

struct Launch {
  std::vector<std::byte> parameters;
  ptx::Dim3 grid{1, 1, 1};
  ptx::Dim3 block{256, 1, 1};
  SparseMemory before;
  SparseMemory after;
};

// A slot at `slot` with descriptors from `descriptors` on, both 8-byte aligned. The vectors that entries name get
// random bytes. Only they and the descriptors may be read, and only the boxes' destinations written, each byte once.
Launch make_launch(dcp_fast::testing::Random& random, uint64_t slot, uint32_t descriptors,
                   const std::vector<Box>& boxes, const std::vector<Entry>& entries);

// One box at a time, of each vector size, without dimensions and with one, two and four.
std::vector<Launch> plain_launches(dcp_fast::testing::Random& random);

// A few small boxes of any shape and vector size, some of them cut into several entries.
Launch random_launch(dcp_fast::testing::Random& random);

// Boxes that span more than 4 GiB, more than 8 GiB, and more than 2^31 vectors, in a slot of nearly 4 GiB, of which
// only some vectors are copied.
std::vector<Launch> sparse_launches(dcp_fast::testing::Random& random);

// What went wrong; empty if memory is as it should be afterwards.
std::string failure_of(const ptx::Kernel& kernel, const Launch& launch, uint64_t steps_per_thread);

}  // namespace simcuda::testing
