// Which parts of which stored chunks does a wanted chunk need? The search behind create_read_items_for_chunk_list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dcp_fast::box {

// `count` chunks of `dims` dimensions as one row each of offsets and then sizes.
struct Chunks {
  std::vector<int64_t> values;
  size_t dims = 0;
  size_t count = 0;

  const int64_t* offsets(size_t chunk) const { return values.data() + chunk * 2 * dims; }
  const int64_t* sizes(size_t chunk) const { return offsets(chunk) + dims; }
};

struct Overlaps {
  // One row for each overlap: index of the wanted chunk, index of the stored chunk, then offsets in the stored chunk,
  // offsets in the wanted chunk, and lengths.
  std::vector<int64_t> rows;
  size_t count = 0;
};

// Every pair of a wanted and a stored chunk that overlap, with the region, in the order in which torch's
// create_read_items_for_chunk_list yields them (torch/distributed/checkpoint/planner_helpers.py): wanted chunks by
// their start in the longest dimension, for each of them the stored chunks by their end in it. As in torch, chunks
// without a volume overlap what surrounds them. Both sides must have the same number of dimensions.
Overlaps find_overlaps(const Chunks& wanted, const Chunks& stored);

}  // namespace dcp_fast::box
