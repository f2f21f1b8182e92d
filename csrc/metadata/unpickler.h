// Runs the opcodes of a metadata pickle and executes nothing: globals are numbers from an allow-list, and what is
// called or built is one of the few objects that objects.h knows. Opcodes: CPython's Lib/pickletools.py.
#pragma once

#include "checkpoint/bytes.h"
#include "metadata/heap.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// Fills the heap and returns the pickled object.
//
// Throws Error(kCorruptMetadata) with the byte offset, or Unsupported.
Value unpickle(checkpoint::Bytes file, Heap& heap);

}  // namespace dcp_fast::metadata
