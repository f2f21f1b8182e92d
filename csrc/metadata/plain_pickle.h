// Writes a part of the metadata as a pickle of its own, for Python to unpickle when it is first looked at.
#pragma once

#include <string>

#include "metadata/heap.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// The pickle names no globals but the classes of paths and torch.Size. What the value shares is shared in it, so that
// it takes at most a small multiple of the file. Throws Unsupported for other values than builtin containers, texts,
// numbers, paths and torch.Size, and Error(kCorruptMetadata) for containers nested deeper than any writer nests them.
std::string plain_pickle(Heap& heap, Value value);

}  // namespace dcp_fast::metadata
