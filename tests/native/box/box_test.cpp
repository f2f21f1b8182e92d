#include "box/box.h"

#include <algorithm>
#include <set>
#include <string>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using box::Dim;
using box::Loops;

namespace {

std::byte* data_of(std::string& bytes) { return reinterpret_cast<std::byte*>(bytes.data()); }

// Offsets on one side of all bytes that loops[level..] visit.
void visit(const Loops& loops, size_t level, int64_t source, int64_t destination,
           std::vector<std::pair<int64_t, int64_t>>& out) {
  if (level == loops.size()) return out.emplace_back(source, destination), void();
  for (int64_t i = 0; i < loops[level].size; ++i) {
    visit(loops, level + 1, source + i * loops[level].source_stride, destination + i * loops[level].destination_stride,
          out);
  }
}

std::vector<std::pair<int64_t, int64_t>> visited(const Loops& loops, size_t level = 0) {
  std::vector<std::pair<int64_t, int64_t>> out;
  if (!loops.empty()) visit(loops, level, 0, 0, out);
  return out;
}

// Copies a box through collapse and copy, and element by element, and compares every byte of the destination.
void check_copy(Random& random, const Ints& sizes, const Ints& source_strides, const Ints& destination_strides,
                int64_t itemsize) {
  constexpr size_t kMargin = 8;
  std::string source = random.bytes(static_cast<size_t>(span_of(sizes, source_strides) * itemsize));
  const auto span = static_cast<size_t>(span_of(sizes, destination_strides) * itemsize);
  std::string expected(span + 2 * kMargin, '#');
  std::string actual = expected;
  for_each_index(sizes, [&](const Ints& index) {
    std::copy_n(source.data() + dot(index, source_strides) * itemsize, itemsize,
                expected.data() + kMargin + dot(index, destination_strides) * itemsize);
  });
  const Loops loops = box::collapse(sizes, source_strides, destination_strides, itemsize);
  box::copy(data_of(actual) + kMargin, data_of(source), loops.data(), loops.size());
  REQUIRE(actual == expected);

  const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
  int64_t volume = itemsize;
  for (const int64_t size : sizes) volume *= size;
  REQUIRE(loops.empty() == empty);
  REQUIRE(box::volume(loops) == volume);
  REQUIRE(box::source_span(loops) == static_cast<int64_t>(source.size()));
  if (empty) return;
  REQUIRE(loops.back().source_stride == 1);
  REQUIRE(loops.back().destination_stride == 1);
  for (size_t i = 0; i + 1 < loops.size(); ++i) {
    const bool ascending = i + 2 >= loops.size() || loops[i].source_stride >= loops[i + 1].source_stride;
    REQUIRE(ascending);
    REQUIRE((loops[i].size > 1));
  }
}

}  // namespace

TEST_CASE("collapse and copy equal an element-wise copy") {
  Random random(1);
  for (int i = 0; i < 4000; ++i) {
    const Ints sizes = random_sizes(random, random.below(6), random.chance(5) ? 0 : 1, 5);
    check_copy(random, sizes, random_strides(random, sizes), random_strides(random, sizes), random.between(1, 16));
  }
}

TEST_CASE("copies of expanded sources equal an element-wise copy") {
  Random random(2);
  for (int i = 0; i < 500; ++i) {
    const Ints sizes = random_sizes(random, random.below(4) + 1, 1, 5);
    Ints strides = random_strides(random, sizes);
    for (int64_t& stride : strides) stride = random.chance(40) ? random.between(0, 2) : stride;
    const int64_t itemsize = random.between(1, 16);
    check_copy(random, sizes, strides, random_strides(random, sizes), itemsize);
  }
}

TEST_CASE("transpositions in tiles equal an element-wise copy") {
  Random random(3);
  for (int i = 0; i < 60; ++i) {
    // Past one tile and not a multiple of it, with destinations wide enough for the tiled walk.
    const Ints sizes = {random.between(1, 100), random.between(1, 150)};
    const Ints source = {sizes[1] + random.between(0, 3), 1};
    const Ints destination = {1, sizes[0] + random.between(0, 300)};
    check_copy(random, sizes, source, destination, random.between(1, 16));
    const Ints batched = {random.between(1, 3), sizes[0], sizes[1]};
    check_copy(random, batched, random_strides(random, batched), random_strides(random, batched),
               random.between(1, 16));
  }
}

TEST_CASE("contiguous dimensions become one run") {
  CHECK(box::collapse({4, 5, 6}, {30, 6, 1}, {30, 6, 1}, 4) == Loops{{480, 1, 1}});
  CHECK(box::collapse({}, {}, {}, 8) == Loops{{8, 1, 1}});
  CHECK(box::collapse({1, 1}, {77, 99}, {3, 5}, 2) == Loops{{2, 1, 1}});
  // Rows of a matrix on both sides; columns of the source into a contiguous destination.
  CHECK(box::collapse({4, 6}, {6, 1}, {6, 1}, 4) == Loops{{96, 1, 1}});
  CHECK(box::collapse({4, 3}, {6, 1}, {3, 1}, 4) == Loops{{4, 24, 12}, {12, 1, 1}});
  // Contiguous on one side only may not be joined.
  CHECK(box::collapse({4, 6}, {6, 1}, {7, 1}, 1) == Loops{{4, 6, 7}, {6, 1, 1}});
  // A permuted source is walked in its own order.
  CHECK(box::collapse({3, 4}, {1, 3}, {1, 3}, 2) == Loops{{24, 1, 1}});
  CHECK(box::collapse({3, 4}, {1, 3}, {4, 1}, 2) == Loops{{4, 6, 2}, {3, 2, 8}, {2, 1, 1}});
}

TEST_CASE("elements that change their size are joined as elements") {
  CHECK(box::collapse_elements({4, 5, 6}, {30, 6, 1}, {30, 6, 1}, 4, 2) == Loops{{120, 4, 2}, {4, 1, 1}});
  CHECK(box::collapse_elements({}, {}, {}, 8, 4) == Loops{{8, 1, 1}});
  CHECK(box::collapse_elements({1, 1}, {77, 99}, {3, 5}, 2, 8) == Loops{{2, 1, 1}});
  CHECK(box::collapse_elements({4, 3}, {6, 1}, {3, 1}, 4, 2) == Loops{{4, 24, 6}, {3, 4, 2}, {4, 1, 1}});
  CHECK(box::collapse_elements({4, 6}, {6, 1}, {7, 1}, 1, 2) == Loops{{4, 6, 14}, {6, 1, 2}, {1, 1, 1}});
  CHECK(box::collapse_elements({3, 4}, {1, 3}, {4, 1}, 2, 4) == Loops{{4, 6, 4}, {3, 2, 16}, {2, 1, 1}});
  CHECK(box::collapse_elements({4, 6}, {12, 2}, {12, 2}, 4, 4) == Loops{{24, 8, 8}, {4, 1, 1}});
  CHECK(box::collapse_elements({4, 0}, {1, 1}, {1, 1}, 4, 2).empty());
  CHECK(box::volume(box::collapse_elements({4, 3}, {6, 1}, {3, 1}, 4, 2)) == 48);
  CHECK(box::source_span(box::collapse_elements({4, 3}, {6, 1}, {3, 1}, 4, 2)) == (3 * 6 + 3) * 4);
}

TEST_CASE("nothing is copied for an empty box") {
  for (const Ints& sizes : {Ints{0}, Ints{3, 0}, Ints{0, 3}, Ints{2, 0, 2}}) {
    const Ints strides(sizes.size(), 1);
    const Loops loops = box::collapse(sizes, strides, strides, 4);
    CHECK(loops.empty());
    CHECK(box::volume(loops) == 0);
    CHECK(box::source_span(loops) == 0);
    CHECK(box::source_is_disjoint(loops));
    box::copy(nullptr, nullptr, loops.data(), loops.size());
  }
}

TEST_CASE("an empty box may have any strides") {
  // What a hostile pickle may say of a tensor without elements: the strides are never used, so they may not overflow.
  constexpr int64_t kHuge = int64_t{1} << 62;
  CHECK(box::collapse({2, 0}, {kHuge, 1}, {1, 1}, 16).empty());
}

TEST_CASE("span, volume and disjointness at every level equal what the loops visit") {
  Random random(4);
  int disjoint_boxes = 0;
  for (int i = 0; i < 1500; ++i) {
    const Ints sizes = random_sizes(random, random.below(5), 1, 4);
    const bool nested = random.chance(50);
    Ints strides = random_strides(random, sizes);
    if (!nested) {
      for (int64_t& stride : strides) stride = random.between(0, 12);
    }
    const Loops loops = box::collapse(sizes, strides, random_strides(random, sizes), random.between(1, 5));
    for (size_t level = 0; level < loops.size(); ++level) {
      const auto bytes = visited(loops, level);
      const int64_t last = std::max_element(bytes.begin(), bytes.end())->first;
      REQUIRE(box::source_span(loops, level) == last + 1);
      REQUIRE(box::volume(loops, level) == static_cast<int64_t>(bytes.size()));
    }
    std::set<int64_t> sources;
    const auto bytes = visited(loops);
    for (const auto& [source, destination] : bytes) sources.insert(source);
    const bool disjoint = sources.size() == bytes.size();
    // Never claimed falsely, and always seen where dimensions nest, as they do in all that torch.empty makes.
    if (box::source_is_disjoint(loops)) REQUIRE(disjoint);
    if (nested) REQUIRE(box::source_is_disjoint(loops));
    disjoint_boxes += disjoint ? 1 : 0;
  }
  CHECK(disjoint_boxes > 100);
}
