#include "box/cut.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using box::Loops;
using box::Part;

namespace {

using Bytes = std::vector<std::pair<int64_t, int64_t>>;  // positions in the source and in the destination

void visit(const box::Dim* loops, size_t depth, int64_t source, int64_t destination, Bytes& out) {
  if (depth == 0) return out.emplace_back(source, destination), void();
  for (int64_t i = 0; i < loops->size; ++i) {
    visit(loops + 1, depth - 1, source + i * loops->source_stride, destination + i * loops->destination_stride, out);
  }
}

Bytes bytes_of(const Loops& loops) {
  Bytes bytes;
  visit(loops.data(), loops.size(), 0, 0, bytes);
  return bytes;
}

}  // namespace

TEST_CASE("parts of a box within an interval are its bytes there, in ascending order") {
  Random random(40);
  size_t several = 0;
  for (int i = 0; i < 3000; ++i) {
    CAPTURE(i);
    const Ints sizes = random_sizes(random, random.below(5), 1, 5);
    const Loops loops =
        box::collapse(sizes, random_strides(random, sizes), random_strides(random, sizes), random.pick(Ints{1, 2, 4}));
    const Bytes all = bytes_of(loops);
    REQUIRE(std::is_sorted(all.begin(), all.end()));
    const int64_t span = box::source_span(loops);
    for (int j = 0; j < 4; ++j) {
      const int64_t begin = random.between(-3, span);
      const int64_t end = random.chance(20) ? span + 5 : random.between(begin, span + 3);
      Bytes expected;
      for (const auto& byte : all) {
        if (byte.first >= begin && byte.first < end) expected.push_back(byte);
      }
      Bytes found;
      const std::vector<Part> parts = box::cut(loops.data(), loops.size(), begin, end);
      for (const Part& part : parts) {
        REQUIRE(part.packed == static_cast<int64_t>(found.size()));
        for (const auto& [source, destination] : bytes_of(part.loops)) {
          found.emplace_back(part.source + source, part.destination + destination);
        }
      }
      REQUIRE(found == expected);
      REQUIRE(parts.size() <= 2 * loops.size());
      several += parts.size() > 2 ? 1 : 0;
      const int64_t before = box::volume_before(loops.data(), loops.size(), begin);
      REQUIRE(before == std::count_if(all.begin(), all.end(), [&](const auto& byte) { return byte.first < begin; }));
    }
  }
  CHECK(several > 500);
}

TEST_CASE("a box of no loops has no parts") { CHECK(box::cut(nullptr, 0, 0, 10).empty()); }
