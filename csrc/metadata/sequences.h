// Tuples, lists and dicts on the heap.
#pragma once

#include <cstddef>
#include <cstdint>

#include "metadata/heap.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// In the most compact form that holds its items.
Value new_tuple(Heap& heap, const Value* items, size_t count);

// Numbers as Tag::kInts and Tag::kSize have them: an index into Heap::ints.
size_t new_shape(Heap& heap, const int64_t* numbers, size_t count);

Value new_list(Heap& heap);
Value new_dict(Heap& heap);

void append(Heap& heap, Sequence& sequence, const Value* items, size_t count);

// Gives back the place of a dict that no one may ask for again, and its memory if nothing lies behind it.
void free_dict(Heap& heap, Value dict);

}  // namespace dcp_fast::metadata
