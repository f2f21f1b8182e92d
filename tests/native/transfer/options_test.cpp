#include "transfer/options.h"

#include <algorithm>
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

constexpr io::Access kOneByOne{1, 4 << 20, 1, false};
constexpr io::Access kSeveral{1, 16 << 20, 4, true};

void check_bounds(const Options& options, const io::Access& access) {
  const Limits limits = limits_of(options, access);
  REQUIRE(limits.threads >= 1);
  REQUIRE(limits.threads <= 256);
  if (options.threads > 0) REQUIRE(limits.threads <= options.threads);
  REQUIRE(limits.block_bytes >= kMinBlock);
  const int64_t most = options.block_bytes > 0 ? options.block_bytes : access.block_bytes;
  REQUIRE(limits.block_bytes <= std::max(most, kMinBlock));
  REQUIRE(limits.block_of(access) == limits.block_bytes);
  for (const int64_t block : {int64_t{0}, int64_t{1} << 20, int64_t{1} << 50}) {
    const int64_t of_other = limits.block_of({1, block, 1, false});
    REQUIRE(of_other >= kMinBlock);
    REQUIRE(of_other <= limits.block_bytes);
    // An option holds for all sources.
    if (options.block_bytes > 0) REQUIRE(of_other == limits.block_bytes);
    if (options.block_bytes <= 0) REQUIRE(of_other <= std::max(block, kMinBlock));
  }
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
    check_bounds(options, random.chance(50) ? kSeveral : kOneByOne);
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
        check_bounds(options, kSeveral);
        check_bounds(options, kOneByOne);
      }
    }
  }
}

TEST_CASE("the defaults allow parallel work") {
  Options options;
  CHECK(limits_of(options, kSeveral).threads >= 4);
  CHECK(limits_of(options, kOneByOne).threads >= 1);
  CHECK(limits_of(options, kOneByOne).block_bytes >= 1 << 20);  // also where many cores share the bounce buffers
  options.threads = 3;
  CHECK(limits_of(options, kSeveral).threads == 3);
  options.staging_bytes = 0;
  CHECK(limits_of(options, kSeveral).threads == 1);
}

TEST_CASE("a source that wants large blocks gets all of the staging memory for them") {
  for (const int threads : {1, 2, 3, 4, 8, 16}) {
    CAPTURE(threads);
    Options options;
    options.threads = threads;
    const int64_t block = limits_of(options, kSeveral).block_bytes;
    CHECK(block == std::min<int64_t>(kSeveral.block_bytes, (32 << 20) / threads - kSlack));
    CHECK(limits_of(options, kOneByOne).block_bytes == std::min<int64_t>(4 << 20, block));
  }
}
