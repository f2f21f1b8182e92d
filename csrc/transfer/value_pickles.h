// Reads the pickles of many bytes entries, neighbours in one request.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "transfer/layouts.h"
#include "transfer/options.h"

namespace dcp_fast::transfer {

struct ValuePickles {
  std::vector<std::string> pickles;  // one for each record; empty where torch must decide what it is
  int64_t requests = 0;
  int64_t bytes = 0;
};

// `records` are indices into those of the layouts, which have been checked against the sizes of their files.
//
// Throws Error with `record` set (kTruncated, kIo), Interrupted, std::bad_alloc.
ValuePickles read_value_pickles(const Layouts& layouts, const std::vector<size_t>& records, const Options& options,
                                const std::function<bool()>& interrupted);

}  // namespace dcp_fast::transfer
