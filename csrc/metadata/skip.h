// Passes over the rest of a metadata pickle without making what it describes.
//
// Frameworks set attributes of their own on the metadata, and pickle writes them behind torch's. Megatron-Core's plans
// of all ranks are several times as many objects as all else, and hardly anybody looks at them. So the unpickler makes
// nothing of an attribute that has objects: it only counts what is on the stack, at a few nanoseconds for each opcode.
// This tells which attributes there are, that the pickle is whole, and where it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "metadata/cursor.h"
#include "metadata/heap.h"
#include "metadata/memo.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

struct SkippedFields {
  size_t untouched = 0;         // how many of the values that were there are as they were
  std::vector<uint32_t> names;  // keys from there on, as indices into Heap::texts
};

// From an opcode among the fields of the metadata past the STOP. Runs nothing, and takes memory for names only.
//
// `values`: keys and values of fields in turns, as they are on the stack above the mark of the fields.
// `heights`: how many values are above each mark up to the next one, the mark of the fields first.
//
// Nullopt for what cannot be told without making objects: a name that is no text, or another end than that of
// metadata. Throws Error(kCorruptMetadata) and what reading throws.
std::optional<SkippedFields> skip_fields(Heap& heap, Memo& memo, const Value* values,
                                         const std::vector<size_t>& heights, Cursor& cursor);

}  // namespace dcp_fast::metadata
