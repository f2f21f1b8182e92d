#include "driver/touched.h"

#include <random>
#include <set>

#include "doctest/doctest.h"

using simcuda::Interval;
using simcuda::Intervals;
using simcuda::TouchedBytes;

TEST_CASE("touched bytes merge across words and chunks") {
  TouchedBytes touched;
  touched.add(0x10000 - 4, 8);
  touched.add(0x10004, 16);
  touched.add(0x20000, 1);
  touched.add(0x10000, 4);
  const Intervals intervals = touched.intervals();
  REQUIRE(intervals.size() == 2);
  CHECK(intervals[0].begin == 0xfffc);
  CHECK(intervals[0].end == 0x10014);
  CHECK(intervals[1].begin == 0x20000);
  CHECK(intervals[1].end == 0x20001);
}

TEST_CASE("touched bytes are those that were added") {
  std::mt19937_64 random(1);
  TouchedBytes touched;
  std::set<uint64_t> expected;
  for (int index = 0; index < 2000; ++index) {
    const uint64_t address = (random() % 200 << 40) + random() % 200;
    const size_t bytes = random() % 20;
    touched.add(address, bytes);
    for (size_t at = 0; at < bytes; ++at) expected.insert(address + at);
  }
  std::set<uint64_t> found;
  uint64_t last_end = 0;
  for (const Interval& interval : touched.intervals()) {
    CHECK(interval.begin > last_end);
    last_end = interval.end;
    for (uint64_t at = interval.begin; at < interval.end; ++at) found.insert(at);
  }
  CHECK(found == expected);
}
