// Runs the opcodes of a metadata pickle and executes nothing: globals are numbers from an allow-list, and what is
// called or built is one of the few objects that objects.h knows. Opcodes: CPython's Lib/pickletools.py.
#pragma once

#include "metadata/heap.h"
#include "metadata/source.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// How the items of large lists and dicts are read: by batch_reader.h, or opcode by opcode, which makes no difference
// but in time and memory.
enum class Batches { kAtOnce, kOneByOne };

// Fills the heap and returns the pickled object.
//
// Throws Error(kCorruptMetadata) with the byte offset, Unsupported, or what reading the source throws.
Value unpickle(Source& source, Batches batches, Heap& heap);

}  // namespace dcp_fast::metadata
