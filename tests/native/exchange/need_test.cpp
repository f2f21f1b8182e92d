#include "exchange/need.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using exchange::Need;
using exchange::NeededBox;

namespace {

Need random_need(Random& random) {
  Need need({{"a", 100000, 1}, {"a longer name", 200000, -2}, {"", 100000, 3}});
  for (int64_t i = random.between(0, 12); i > 0; --i) {
    const Ints sizes = random_sizes(random, random.below(4), 1, 6);
    const Ints strides = random_strides(random, sizes);
    const auto itemsize = static_cast<int32_t>(random.pick(Ints{1, 4, 8}));
    need.add(static_cast<uint32_t>(random.below(3)), random.between(0, 50000),
             box::collapse(sizes, strides, random_strides(random, sizes), itemsize), itemsize);
  }
  return need;
}

}  // namespace

TEST_CASE("what is encoded is decoded") {
  Random random(50);
  for (int i = 0; i < 300; ++i) {
    Need need = random_need(random);
    const std::vector<int64_t> words = need.encode();
    Need other = Need::decode(words.data(), words.size());
    REQUIRE(other.encode() == words);
    // Of the files it has those that boxes are in.
    std::vector<uint32_t> numbers;
    for (const exchange::NeededFile& file : other.files()) {
      const auto& all = need.files();
      const auto same = std::find_if(all.begin(), all.end(), [&](const auto& of) { return of.name == file.name; });
      REQUIRE(same != all.end());
      REQUIRE((same->size == file.size && same->version == file.version));
      const auto number = static_cast<uint32_t>(same - all.begin());
      REQUIRE(std::any_of(need.boxes().begin(), need.boxes().end(),
                          [&](const NeededBox& box) { return box.file == number; }));
      numbers.push_back((number + 2) % 3);
    }
    need.number_files({2, 0, 1});
    other.number_files(numbers);
    REQUIRE(need.boxes().size() == other.boxes().size());
    for (size_t j = 0; j < need.boxes().size(); ++j) {
      const NeededBox& a = need.boxes()[j];
      const NeededBox& b = other.boxes()[j];
      REQUIRE((a.file == b.file && a.begin == b.begin && a.end == b.end && a.number == b.number && a.grain == b.grain));
      if (j > 0) REQUIRE((need.boxes()[j - 1].file <= a.file));
    }
  }
}

TEST_CASE("the boxes within a range are those that touch it") {
  Random random(51);
  for (int i = 0; i < 300; ++i) {
    Need need = random_need(random);
    need.number_files({0, 1, 2});
    for (int j = 0; j < 10; ++j) {
      const auto file = static_cast<uint32_t>(random.below(3));
      const int64_t begin = random.between(0, 50100);
      const int64_t end = begin + random.between(1, 3000);
      std::vector<uint32_t> expected;
      for (const NeededBox& box : need.boxes()) {
        if (box.file == file && box.begin < end && box.end > begin) expected.push_back(box.number);
      }
      std::vector<uint32_t> found;
      need.each_within(file, begin, end, [&](const NeededBox& box) { found.push_back(box.number); });
      REQUIRE(found == expected);
    }
  }
}

TEST_CASE("damaged needs are refused, and nothing is allocated by their numbers") {
  Random random(52);
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::vector<int64_t> words = random_need(random).encode();
    if (random.chance(30)) {
      words.resize(random.below(words.size() + 1));
    } else {
      const Ints wild = {-1, 0, 1, 2, 1 << 20, int64_t{1} << 62, INT64_MAX, INT64_MIN, random.between(0, 100)};
      words[random.below(words.size())] = random.pick(wild);
    }
    try {
      Need::decode(words.data(), words.size());
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  }
  CHECK(refused > 1000);
}
