#include "transfer/options.h"

#include <algorithm>

#include "transfer/cores.h"

namespace dcp_fast::transfer {

namespace {
constexpr int kMaxThreads = 256;
constexpr int kMaxDefaultThreads = 16;
constexpr int64_t kMinBlock = 64 << 10;
constexpr int64_t kSlack = 2 * static_cast<int64_t>(io::kPageBytes);  // a block may begin and end within a page
}  // namespace

int reader_threads(int wanted, int requests_at_once) {
  if (wanted > 0) return std::min(wanted, kMaxThreads);
  return std::max(std::min(usable_cores(), kMaxDefaultThreads), requests_at_once);
}

int64_t Limits::block_of(const io::Access& access) const {
  return source_decides ? std::clamp(access.block_bytes, kMinBlock, block_bytes) : block_bytes;
}

Limits limits_of(const Options& options, const io::Access& access) {
  Limits limits;
  limits.source_decides = options.block_bytes <= 0;
  limits.most_gap = options.most_gap;
  limits.threads = reader_threads(options.threads, access.requests_at_once);
  limits.block_bytes = std::max(limits.source_decides ? access.block_bytes : options.block_bytes, kMinBlock);
  const int64_t share = std::max<int64_t>(options.staging_bytes, 0) / limits.threads - kSlack;
  limits.block_bytes = std::max(kMinBlock, std::min(limits.block_bytes, share));
  const int64_t affordable = std::max<int64_t>(options.staging_bytes, 0) / (limits.block_bytes + kSlack);
  limits.threads = static_cast<int>(std::clamp<int64_t>(affordable, 1, limits.threads));
  return limits;
}

}  // namespace dcp_fast::transfer
