// torch's current streams, as Python has them.
#pragma once

#include <cstdint>
#include <map>

#include "cuda/driver_abi.h"

namespace dcp_fast {

using StreamsByDevice = std::map<int, uint64_t>;  // torch's current streams, as handles

inline std::map<int, cuda::StreamHandle> stream_handles(const StreamsByDevice& streams) {
  std::map<int, cuda::StreamHandle> handles;
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  for (const auto& [device, stream] : streams) handles[device] = reinterpret_cast<cuda::StreamHandle>(stream);
  return handles;
}

}  // namespace dcp_fast
