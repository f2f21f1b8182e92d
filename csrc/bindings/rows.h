// Columns of integers for Python, which hands them back.
#pragma once

#include <cstdint>
#include <vector>

namespace dcp_fast {

// Rows of integers, as a buffer.
struct Rows {
  std::vector<int64_t> values;
};

}  // namespace dcp_fast
