#include "transfer/options.h"

#include <algorithm>

#include "transfer/cores.h"

namespace dcp_fast::transfer {

namespace {
constexpr int kMaxThreads = 256;
constexpr int kMaxDefaultThreads = 16;
constexpr int kDirectThreads = 4;  // outstanding requests that keep a disk busy, whatever the number of cores
constexpr int64_t kMinBlock = 64 << 10;
constexpr int64_t kSlack = 2 * static_cast<int64_t>(io::kDirectAlignment);
}  // namespace

Settled settle(const Options& options, bool any_direct) {
  int threads = options.threads;
  if (threads <= 0) {
    threads = std::min(usable_cores(), kMaxDefaultThreads);
    if (any_direct) threads = std::max(threads, kDirectThreads);
  }
  Settled settled;
  settled.threads = std::min(threads, kMaxThreads);
  settled.block_bytes = std::max(options.block_bytes, kMinBlock);
  const int64_t share = std::max<int64_t>(options.staging_bytes, 0) / settled.threads - kSlack;
  settled.block_bytes = std::max(kMinBlock, std::min(settled.block_bytes, share));
  const int64_t affordable = std::max<int64_t>(options.staging_bytes, 0) / (settled.block_bytes + kSlack);
  settled.threads = static_cast<int>(std::clamp<int64_t>(affordable, 1, settled.threads));
  return settled;
}

}  // namespace dcp_fast::transfer
