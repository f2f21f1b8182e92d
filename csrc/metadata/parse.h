// Reads the metadata of a checkpoint, a pickle of torch's Metadata, into columns. Executes nothing.
#pragma once

#include "metadata/columns.h"
#include "metadata/source.h"
#include "metadata/unpickler.h"

namespace dcp_fast::metadata {

// Takes time and memory in proportion to the file. Throws Unsupported for what only Python can read or refuse,
// Error(kCorruptMetadata) for what contradicts itself, and what reading the source throws.
Columns parse(Source& source, Batches batches = Batches::kAtOnce);

}  // namespace dcp_fast::metadata
