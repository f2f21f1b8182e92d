#include "transfer/options.h"

#include <algorithm>

#include "transfer/cores.h"

namespace dcp_fast::transfer {

namespace {
constexpr int kMaxThreads = 256;
constexpr int kMaxDefaultThreads = 16;
constexpr int kDirectThreads = 4;
constexpr int64_t kMinBlock = 64 << 10;
constexpr int64_t kSlack = 2 * static_cast<int64_t>(io::kDirectAlignment);
}  // namespace

int reader_threads(int wanted, bool any_direct) {
  if (wanted > 0) return std::min(wanted, kMaxThreads);
  const int threads = std::min(usable_cores(), kMaxDefaultThreads);
  return any_direct ? std::max(threads, kDirectThreads) : threads;
}

Settled settle(const Options& options, bool any_direct) {
  Settled settled;
  settled.threads = reader_threads(options.threads, any_direct);
  settled.block_bytes = std::max(options.block_bytes, kMinBlock);
  const int64_t share = std::max<int64_t>(options.staging_bytes, 0) / settled.threads - kSlack;
  settled.block_bytes = std::max(kMinBlock, std::min(settled.block_bytes, share));
  const int64_t affordable = std::max<int64_t>(options.staging_bytes, 0) / (settled.block_bytes + kSlack);
  settled.threads = static_cast<int>(std::clamp<int64_t>(affordable, 1, settled.threads));
  return settled;
}

}  // namespace dcp_fast::transfer
