#include "transfer/waves.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using transfer::assign_waves;
using transfer::ConflictLimits;
using transfer::Write;

namespace {

// Tensors that look into one piece of memory, and boxes that are written to them.
struct Tensor {
  int64_t start = 0;
  Ints sizes;
  Ints strides;
};

struct Box {
  size_t tensor = 0;
  Ints offsets;
  Ints sizes;
};

std::vector<Write> writes_of(const std::vector<Tensor>& tensors, const std::vector<Box>& boxes) {
  constexpr uint64_t kBase = 0x10000;
  std::vector<Write> writes;
  for (const Box& box : boxes) {
    const Tensor& tensor = tensors[box.tensor];
    Write write;
    const auto begin = static_cast<uint64_t>(tensor.start + dot(box.offsets, tensor.strides));
    const auto span = static_cast<uint64_t>(span_of(box.sizes, tensor.strides));
    write.begin = span > 0 ? kBase + begin : 0;
    write.end = write.begin + span;
    write.destination = box.tensor;
    write.offsets = box.offsets.data();
    write.sizes = box.sizes.data();
    write.dims = box.sizes.size();
    writes.push_back(write);
  }
  return writes;
}

std::vector<int> play(const std::vector<Tensor>& tensors, const std::vector<Box>& boxes,
                      const std::vector<size_t>& order, size_t memory) {
  std::vector<int> cells(memory, -1);
  for (const size_t i : order) {
    const Tensor& tensor = tensors[boxes[i].tensor];
    const int64_t begin = tensor.start + dot(boxes[i].offsets, tensor.strides);
    for_each_index(boxes[i].sizes, [&](const Ints& index) {
      cells[static_cast<size_t>(begin + dot(index, tensor.strides))] = static_cast<int>(i);
    });
  }
  return cells;
}

}  // namespace

TEST_CASE("any order within the waves gives what one item after another gives") {
  Random random(70);
  constexpr size_t kMemory = 200;
  int conflicts = 0;
  for (int i = 0; i < 4000; ++i) {
    std::vector<Tensor> tensors(random.below(4) + 1);
    for (Tensor& tensor : tensors) {
      do {
        tensor.sizes = random_sizes(random, random.below(4), 1, 6);
        tensor.strides = random_strides(random, tensor.sizes);
      } while (span_of(tensor.sizes, tensor.strides) > static_cast<int64_t>(kMemory));
      tensor.start = random.between(0, static_cast<int64_t>(kMemory) - span_of(tensor.sizes, tensor.strides));
    }
    std::vector<Box> boxes(random.below(12));
    for (Box& box : boxes) {
      box.tensor = random.below(tensors.size());
      for (const int64_t size : tensors[box.tensor].sizes) {
        box.sizes.push_back(random.between(random.chance(5) ? 0 : 1, size));
        box.offsets.push_back(random.between(0, size - box.sizes.back()));
      }
    }
    // By boxes, by addresses alone, and by whichever suffices for each group of neighbours.
    const auto limits = random.pick(std::vector<ConflictLimits>{{}, {0, 0}, {3, 1}});
    const std::vector<int32_t> waves = assign_waves(writes_of(tensors, boxes), limits);
    REQUIRE(waves.size() == boxes.size());
    std::vector<size_t> order(boxes.size());
    std::iota(order.begin(), order.end(), size_t{0});
    const std::vector<int> expected = play(tensors, boxes, order, kMemory);
    for (int shuffle = 0; shuffle < 3; ++shuffle) {
      random.shuffle(order);
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return waves[a] < waves[b]; });
      REQUIRE(play(tensors, boxes, order, kMemory) == expected);
    }
    for (const int32_t wave : waves) {
      REQUIRE(wave >= 0);
      conflicts += wave > 0 ? 1 : 0;
    }
    // No wave is skipped: an item waits only for one of the wave before it.
    for (const int32_t wave : waves) {
      if (wave > 0) REQUIRE(std::count(waves.begin(), waves.end(), wave - 1) > 0);
    }
  }
  CHECK(conflicts > 1000);
}

TEST_CASE("disjoint boxes of one tensor are one wave, however they interleave in memory") {
  Random random(71);
  for (int i = 0; i < 300; ++i) {
    const std::vector<Tensor> tensors = {{0, {8, 12}, random.chance(50) ? Ints{12, 1} : Ints{1, 8}}};
    std::vector<Box> boxes;
    const int64_t height = random.pick(std::vector<int64_t>{1, 2, 4, 8});
    const int64_t width = random.pick(std::vector<int64_t>{1, 3, 4, 12});
    for (int64_t row = 0; row < 8; row += height) {
      for (int64_t column = 0; column < 12; column += width) boxes.push_back({0, {row, column}, {height, width}});
    }
    random.shuffle(boxes);
    for (const int32_t wave : assign_waves(writes_of(tensors, boxes))) REQUIRE(wave == 0);
  }
}

TEST_CASE("a replaced tensor waits for the one that it replaces") {
  const std::vector<Tensor> tied = {{0, {4, 4}, {4, 1}}, {0, {16}, {1}}, {16, {4}, {1}}};
  const std::vector<Box> boxes = {{0, {0, 0}, {4, 4}}, {1, {0}, {16}}, {2, {0}, {4}}, {0, {0, 0}, {4, 4}}};
  CHECK(assign_waves(writes_of(tied, boxes)) == std::vector<int32_t>{0, 1, 0, 2});
}

TEST_CASE("writes of nothing never wait") {
  const std::vector<Tensor> tensors = {{0, {4}, {1}}};
  const std::vector<Box> boxes = {{0, {0}, {4}}, {0, {0}, {0}}, {0, {2}, {0}}, {0, {0}, {4}}};
  CHECK(assign_waves(writes_of(tensors, boxes)) == std::vector<int32_t>{0, 0, 0, 1});
  CHECK(assign_waves({}).empty());
  CHECK(assign_waves(std::vector<Write>(3)) == std::vector<int32_t>{0, 0, 0});
}

TEST_CASE("scalars that share their memory wait for each other") {
  const std::vector<Tensor> tensors = {{0, {}, {}}, {0, {}, {}}, {1, {}, {}}};
  const std::vector<Box> boxes = {{0, {}, {}}, {0, {}, {}}, {1, {}, {}}, {2, {}, {}}};
  CHECK(assign_waves(writes_of(tensors, boxes)) == std::vector<int32_t>{0, 1, 2, 0});
}

TEST_CASE("many disjoint boxes take little time") {
  const auto start = std::chrono::steady_clock::now();
  const std::vector<Tensor> tensors = {{0, {300, 300}, {300, 1}}};
  std::vector<Box> boxes;
  for (int64_t row = 0; row < 300; row += 2) {
    for (int64_t column = 0; column < 300; column += 2) boxes.push_back({0, {row, column}, {2, 2}});
  }
  for (const int32_t wave : assign_waves(writes_of(tensors, boxes))) REQUIRE(wave == 0);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60));
}

TEST_CASE("thousands of aliases take little time and memory, and come one after another") {
  const auto start = std::chrono::steady_clock::now();
  constexpr size_t kAliases = 50000;
  std::vector<Tensor> tensors(kAliases, Tensor{0, {4}, {1}});
  std::vector<Box> boxes;
  for (size_t i = 0; i < kAliases; ++i) boxes.push_back({i, {0}, {4}});
  std::vector<int32_t> waves = assign_waves(writes_of(tensors, boxes));
  for (size_t i = 0; i < kAliases; ++i) REQUIRE(waves[i] == static_cast<int32_t>(i));
  // The same of one tensor, in windows that overlap only in part.
  tensors = {{0, {2 * static_cast<int64_t>(kAliases)}, {1}}};
  for (size_t i = 0; i < kAliases; ++i) boxes[i] = {0, {static_cast<int64_t>(i)}, {static_cast<int64_t>(kAliases)}};
  waves = assign_waves(writes_of(tensors, boxes));
  for (size_t i = 0; i < kAliases; ++i) REQUIRE(waves[i] == static_cast<int32_t>(i));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(60));
}

TEST_CASE("where addresses must do, writes far apart are still one wave") {
  const std::vector<Tensor> tensors = {{0, {4}, {1}}, {2, {4}, {1}}, {10, {4}, {1}}, {5, {6}, {1}}};
  const std::vector<Box> boxes = {{0, {0}, {4}}, {2, {0}, {4}}, {1, {0}, {4}}, {3, {0}, {6}}, {0, {0}, {2}}};
  CHECK(assign_waves(writes_of(tensors, boxes), {0, 0}) == std::vector<int32_t>{0, 0, 1, 2, 1});
}
