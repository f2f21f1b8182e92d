// Reads the metadata of a checkpoint, a pickle of torch's Metadata, into columns. Executes nothing.
#pragma once

#include "checkpoint/bytes.h"
#include "metadata/columns.h"

namespace dcp_fast::metadata {

// Takes time and memory in proportion to the file. Throws Unsupported for what only Python can read or refuse, and
// Error(kCorruptMetadata) for what contradicts itself.
Columns parse(checkpoint::Bytes file);

}  // namespace dcp_fast::metadata
