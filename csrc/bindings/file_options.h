// The options of a load from local files, as Python has them.
#pragma once

#include "io/file.h"
#include "transfer/options.h"

namespace dcp_fast {

struct FileOptions : transfer::Options {
  io::IoMode mode = io::IoMode::kAuto;
  io::Readers readers = io::Readers::kThisRank;
};

}  // namespace dcp_fast
