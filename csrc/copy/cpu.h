// Which vector instructions this processor has. One binary has code for all of them, and the choice is made when
// something is copied first, so that the library runs on every processor of its architecture.
#pragma once

#include <vector>

namespace dcp_fast::copy {

enum class Vectors { kNone, kSse2, kAvx2, kAvx512, kNeon };

// All that this processor and this build can run, the fastest last. There is at least kNone.
const std::vector<Vectors>& runnable_vectors();

}  // namespace dcp_fast::copy
