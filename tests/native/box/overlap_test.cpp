#include "box/overlap.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using box::Chunks;

namespace {

struct Chunk {
  Ints offsets;
  Ints sizes;
};

Chunks columns(const std::vector<Chunk>& chunks, size_t dims) {
  Chunks result;
  result.dims = dims;
  result.count = chunks.size();
  for (const Chunk& chunk : chunks) {
    result.values.insert(result.values.end(), chunk.offsets.begin(), chunk.offsets.end());
    result.values.insert(result.values.end(), chunk.sizes.begin(), chunk.sizes.end());
  }
  return result;
}

size_t longest_dim(const std::vector<Chunk>& wanted, const std::vector<Chunk>& stored, size_t dims) {
  size_t longest = 0;
  int64_t most = 0;
  for (size_t dim = 0; dim < dims; ++dim) {
    int64_t extent = 0;
    for (const Chunk& chunk : wanted) extent = std::max(extent, chunk.offsets[dim] + chunk.sizes[dim]);
    for (const Chunk& chunk : stored) extent = std::max(extent, chunk.offsets[dim] + chunk.sizes[dim]);
    if (extent > most) {
      most = extent;
      longest = dim;
    }
  }
  return longest;
}

std::vector<size_t> order_by(size_t count, const std::function<int64_t(size_t)>& key) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
  return order;
}

// Every pair, in the documented order, with torch's arithmetic (torch/distributed/checkpoint/resharding.py).
Ints all_pairs(const std::vector<Chunk>& wanted, const std::vector<Chunk>& stored, size_t dims) {
  const size_t longest = longest_dim(wanted, stored, dims);
  const auto start = [&](size_t i) { return dims == 0 ? 0 : wanted[i].offsets[longest]; };
  const auto end = [&](size_t i) { return dims == 0 ? 1 : stored[i].offsets[longest] + stored[i].sizes[longest]; };
  Ints rows;
  for (const size_t w : order_by(wanted.size(), start)) {
    for (const size_t s : order_by(stored.size(), end)) {
      Ints row = {static_cast<int64_t>(w), static_cast<int64_t>(s)};
      Ints in_wanted, lengths;
      bool overlap = true;
      for (size_t dim = 0; dim < dims; ++dim) {
        const int64_t a = wanted[w].offsets[dim], a_end = a + wanted[w].sizes[dim];
        const int64_t b = stored[s].offsets[dim], b_end = b + stored[s].sizes[dim];
        overlap = overlap && a < b_end && b < a_end;
        row.push_back(b > a ? 0 : a - b);
        in_wanted.push_back(b > a ? b - a : 0);
        lengths.push_back(std::min(a_end, b_end) - std::max(a, b));
      }
      if (!overlap) continue;
      for (const Ints* part : {&row, &in_wanted, &lengths}) rows.insert(rows.end(), part->begin(), part->end());
    }
  }
  return rows;
}

std::vector<Chunk> random_chunks(Random& random, size_t dims, int64_t empty_percent) {
  std::vector<Chunk> chunks(random.below(8));
  for (Chunk& chunk : chunks) {
    chunk.offsets = random_sizes(random, dims, 0, 9);
    chunk.sizes = random_sizes(random, dims, random.chance(static_cast<int>(empty_percent)) ? 0 : 1, 6);
  }
  return chunks;
}

// Cuts a tensor into a grid with cuts at random places, some of them twice, so that chunks may be empty.
std::vector<Chunk> random_grid(Random& random, const Ints& sizes) {
  std::vector<Chunk> chunks = {{{}, {}}};
  for (const int64_t size : sizes) {
    Ints cuts = {0, size};
    for (int64_t i = random.between(0, 3); i > 0; --i) cuts.push_back(random.between(0, size));
    std::sort(cuts.begin(), cuts.end());
    std::vector<Chunk> finer;
    for (const Chunk& chunk : chunks) {
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        finer.push_back(chunk);
        finer.back().offsets.push_back(cuts[i]);
        finer.back().sizes.push_back(cuts[i + 1] - cuts[i]);
      }
    }
    chunks = std::move(finer);
  }
  random.shuffle(chunks);
  return chunks;
}

}  // namespace

TEST_CASE("overlaps equal a search through all pairs, in torch's order") {
  Random random(10);
  size_t found = 0;
  for (int i = 0; i < 5000; ++i) {
    const size_t dims = random.below(5);
    const int64_t empty_percent = random.chance(50) ? 0 : 40;
    const auto wanted = random_chunks(random, dims, empty_percent);
    const auto stored = random_chunks(random, dims, empty_percent);
    const box::Overlaps overlaps = box::find_overlaps(columns(wanted, dims), columns(stored, dims));
    REQUIRE(overlaps.rows == all_pairs(wanted, stored, dims));
    REQUIRE(overlaps.rows.size() == overlaps.count * (2 + 3 * dims));
    found += overlaps.count;
  }
  CHECK(found > 1000);
}

TEST_CASE("the overlaps of two grids cover every cell once, in the right place") {
  Random random(11);
  for (int i = 0; i < 400; ++i) {
    const size_t dims = random.below(3) + 1;
    const Ints sizes = random_sizes(random, dims, 1, 8);
    const auto wanted = random_grid(random, sizes);
    const auto stored = random_grid(random, sizes);
    const box::Overlaps overlaps = box::find_overlaps(columns(wanted, dims), columns(stored, dims));
    std::map<Ints, int> covered;
    for (size_t row = 0; row < overlaps.count; ++row) {
      const int64_t* values = overlaps.rows.data() + row * (2 + 3 * dims);
      const Chunk& to = wanted[static_cast<size_t>(values[0])];
      const Chunk& from = stored[static_cast<size_t>(values[1])];
      for_each_index(Ints(values + 2 + 2 * dims, values + 2 + 3 * dims), [&](const Ints& index) {
        Ints cell(dims);
        for (size_t dim = 0; dim < dims; ++dim) {
          cell[dim] = from.offsets[dim] + values[2 + dim] + index[dim];
          REQUIRE(cell[dim] == to.offsets[dim] + values[2 + dims + dim] + index[dim]);
        }
        ++covered[cell];
      });
    }
    for_each_index(sizes, [&](const Ints& cell) { REQUIRE(covered[cell] == 1); });
    REQUIRE(covered.size() == static_cast<size_t>(span_of(sizes, contiguous_strides(sizes))));
  }
}

TEST_CASE("scalars overlap each other") {
  const Chunks one = columns({{{}, {}}}, 0);
  const Chunks two = columns({{{}, {}}, {{}, {}}}, 0);
  CHECK(box::find_overlaps(one, one).rows == Ints{0, 0});
  CHECK(box::find_overlaps(two, two).rows == Ints{0, 0, 0, 1, 1, 0, 1, 1});
}

TEST_CASE("nothing overlaps with no chunks") {
  const Chunks none = columns({}, 2);
  const Chunks one = columns({{{0, 0}, {2, 2}}}, 2);
  CHECK(box::find_overlaps(none, one).count == 0);
  CHECK(box::find_overlaps(one, none).count == 0);
  CHECK(box::find_overlaps(none, none).count == 0);
}

TEST_CASE("a chunk without volume overlaps what surrounds it") {
  const Chunks empty = columns({{{2}, {0}}}, 1);
  const Chunks around = columns({{{0}, {4}}, {{2}, {4}}, {{0}, {2}}}, 1);
  CHECK(box::find_overlaps(empty, around).rows == Ints{0, 0, 2, 0, 0});
}
