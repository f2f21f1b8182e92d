// What many safetensors files hold together.
#pragma once

#include <string>
#include <vector>

#include "io/byte_source.h"
#include "metadata/columns.h"
#include "metadata/safetensors.h"

namespace dcp_fast::metadata {

// Columns of all files, in their order: what torch's HuggingFaceStorageReader makes of them. Of equal keys of
// storage_data the last one counts. `paths`: of the files, in UTF-8 as Columns::files. Throws Error(kCorruptHeader) if
// the files contradict each other, and Unsupported.
Columns collect_headers(const std::vector<Header>& headers, const std::vector<std::string>& paths);

// Checks an index: JSON that says which file holds each tensor. Throws Error(kIo) with ENOENT for a file that `paths`
// lack, Error(kCorruptHeader) for a tensor that its file lacks and for JSON that is no index, and what reading it
// throws.
void check_index(const io::ByteSource& index, const std::vector<Header>& headers, const std::vector<std::string>& paths,
                 io::IoCounters& counters);

}  // namespace dcp_fast::metadata
