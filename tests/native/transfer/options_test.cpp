#include "transfer/options.h"

#include <climits>

#include "doctest/doctest.h"
#include "random.h"

using namespace dcp_fast;
using dcp_fast::testing::Random;
using transfer::Limits;
using transfer::limits_of;
using transfer::Options;

namespace {

constexpr int64_t kMinBlock = 64 << 10;
constexpr int64_t kSlack = 2 * static_cast<int64_t>(io::kPageBytes);

void check_bounds(const Options& options, const Limits& limits) {
  REQUIRE(limits.threads >= 1);
  REQUIRE(limits.threads <= 256);
  if (options.threads > 0) REQUIRE(limits.threads <= options.threads);
  REQUIRE(limits.block_bytes >= kMinBlock);
  REQUIRE(limits.block_bytes <= std::max(options.block_bytes, kMinBlock));
  // The bounce buffers of all threads together stay within the limit, unless one thread with the smallest block passes
  // it.
  const bool smallest = limits.threads == 1 && limits.block_bytes == kMinBlock;
  if (!smallest) REQUIRE(limits.threads <= options.staging_bytes / (limits.block_bytes + kSlack));
}

}  // namespace

TEST_CASE("the limits of options keep what is asked") {
  Random random(60);
  for (int i = 0; i < 20000; ++i) {
    Options options;
    options.threads = static_cast<int>(random.between(-1, 300));
    options.block_bytes = random.between(0, int64_t{1} << random.between(10, 40));
    options.staging_bytes = random.between(0, int64_t{1} << random.between(10, 40));
    check_bounds(options, limits_of(options, random.chance(50) ? 4 : 1));
  }
}

TEST_CASE("extreme options have limits too") {
  for (const int threads : {INT_MIN, -1, 0, 1, INT_MAX}) {
    for (const int64_t block : {INT64_MIN, int64_t{-1}, int64_t{0}, int64_t{1}, INT64_MAX}) {
      for (const int64_t staging : {int64_t{-1}, int64_t{0}, int64_t{1}, INT64_MAX}) {
        Options options;
        options.threads = threads;
        options.block_bytes = block;
        options.staging_bytes = staging;
        check_bounds(options, limits_of(options, 4));
        check_bounds(options, limits_of(options, 1));
      }
    }
  }
}

TEST_CASE("the defaults allow parallel work") {
  Options options;
  CHECK(limits_of(options, 4).threads >= 4);
  CHECK(limits_of(options, 1).threads >= 1);
  CHECK(limits_of(options, 1).block_bytes >= 1 << 20);  // also where many cores share the bounce buffers
  options.threads = 3;
  CHECK(limits_of(options, 4).threads == 3);
  options.staging_bytes = 0;
  CHECK(limits_of(options, 4).threads == 1);
}
