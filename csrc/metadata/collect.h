// Turns the chunks that a list is given, and the storage rows that a dict is given, into columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "metadata/heap.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// torch's own limit for tensors.
inline constexpr size_t kMaxDims = 64;

// Both: false, and nothing happened, if the items are something else. Throw Unsupported for what columns cannot hold.
bool collect_chunks(Heap& heap, Sequence& list, const Value* items, size_t count);
bool collect_rows(Heap& heap, Sequence& dict, const Value* items, size_t count);

// What was collected goes into the list or dict.
void append_run(Heap& heap, Sequence& list, const ChunkRun& run);
void append_rows(Heap& heap, Sequence& dict, size_t first, size_t count);

// Whether numbers of a shape may be repeated: what is shared in the file is not shared in columns.
inline bool has_room(const Heap& heap, size_t count) { return heap.columns.numbers.size() + count <= heap.file_size; }

// Whether a chunk has no negative offset or size, and does not end beyond what 64 bits count.
bool is_sound(const int64_t* offsets, const int64_t* sizes, size_t dims);

}  // namespace dcp_fast::metadata
