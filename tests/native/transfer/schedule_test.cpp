#include "transfer/schedule.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using transfer::Piece;
using transfer::Policy;
using transfer::Schedule;
using transfer::Task;

namespace {

constexpr int64_t kBlock = 4096;

Schedule make_schedule(const std::vector<Piece>& boxes, const std::vector<Policy>& policies) {
  return join_pieces(split_boxes(boxes, policies), policies);
}

std::vector<Policy> policies_for(Random& random, size_t files) {
  std::vector<Policy> policies;
  for (size_t i = 0; i < files; ++i) {
    const int64_t cost = random.pick(std::vector<int64_t>{1, 16, 100, 1000, 100000});
    const int64_t block = random.pick(std::vector<int64_t>{64, 500, kBlock, 100000});
    const bool fills_blocks = random.chance(50);
    const int64_t run = fills_blocks || random.chance(50) ? block : 5 * block;
    policies.push_back({cost, block, random.chance(50), run, fills_blocks});
  }
  return policies;
}

// Which source byte of which file each destination byte gets, and how often it is written.
struct Trace {
  explicit Trace(const std::string& memory)
      : base(reinterpret_cast<const std::byte*>(memory.data())), times(memory.size(), 0), sources(memory.size()) {}

  void add(size_t file, const box::Loops& loops, size_t level, int64_t source, const std::byte* destination) {
    if (level == loops.size()) {
      const auto at = static_cast<size_t>(destination - base);
      ++times[at];
      sources[at] = {file, source};
      return;
    }
    for (int64_t i = 0; i < loops[level].size; ++i) {
      add(file, loops, level + 1, source + i * loops[level].source_stride,
          destination + i * loops[level].destination_stride);
    }
  }

  const std::byte* base;
  std::vector<int> times;
  std::vector<std::pair<size_t, int64_t>> sources;
};

// The largest span that the engine would read in one request for a piece: see Reader::run in reader.cpp.
int64_t largest_read(const Policy& policy, const box::Loops& loops, size_t level = 0) {
  if (policy.reads_through(loops, level)) return box::source_span(loops, level);
  return level + 1 == loops.size() ? loops[level].size : largest_read(policy, loops, level + 1);
}

int64_t requests_for(const Policy& policy, const box::Loops& loops, size_t level = 0) {
  if (level + 1 == loops.size() || policy.reads_through(loops, level)) return 1;
  return loops[level].size * requests_for(policy, loops, level + 1);
}

int64_t end_of(const Piece& piece) { return piece.source + box::source_span(piece.loops); }

// Boxes anywhere in a few files, with destinations one after another in `memory`.
std::vector<Piece> random_boxes(Random& random, std::string& memory, size_t files) {
  std::vector<Piece> boxes(random.below(6));
  std::vector<int64_t> starts;
  int64_t next = 0;
  for (Piece& box : boxes) {
    const Ints sizes = random_sizes(random, random.below(4), 1, random.chance(20) ? 12 : 6);
    const int64_t itemsize = random.between(1, 8);
    const Ints strides = random_strides(random, sizes);
    box.file = random.below(files);
    box.source = random.between(0, 3000);
    box.item = starts.size();
    box.loops = box::collapse(sizes, random_strides(random, sizes), strides, itemsize);
    starts.push_back(next);
    next += span_of(sizes, strides) * itemsize;
  }
  memory.assign(static_cast<size_t>(next), '#');
  auto* base = reinterpret_cast<std::byte*>(memory.data());
  for (size_t i = 0; i < boxes.size(); ++i) boxes[i].destination = base + starts[i];
  return boxes;
}

}  // namespace

TEST_CASE("pieces partition the boxes, stay within a block, and tasks partition the pieces") {
  Random random(80);
  std::string memory;
  for (int i = 0; i < 1200; ++i) {
    const size_t files = random.below(3) + 1;
    const auto policies = policies_for(random, files);
    const auto boxes = random_boxes(random, memory, files);
    const Schedule schedule = make_schedule(boxes, policies);
    size_t next = 0;
    Trace actual(memory);
    for (const Task& task : schedule.tasks) {
      REQUIRE(task.first == next);
      REQUIRE(task.count > 0);
      next += task.count;
      const Policy& policy = policies[task.range.file];
      for (size_t p = task.first; p < next; ++p) {
        const Piece& piece = schedule.pieces[p];
        REQUIRE(!piece.loops.empty());
        REQUIRE(boxes[piece.item].file == task.range.file);
        const bool contiguous = piece.loops.size() == 1;
        REQUIRE(largest_read(policy, piece.loops) <= (contiguous ? policy.run_bytes : policy.block_bytes));
        const int64_t requests = requests_for(policy, piece.loops);
        if (requests > 1) REQUIRE(requests * policy.request_cost <= policy.block_bytes);
        actual.add(task.range.file, piece.loops, 0, piece.source, piece.destination);
        if (task.count == 1) continue;
        // Joined pieces come in one request: in order, apart, and all of them in one block.
        const Piece& first = schedule.pieces[task.first];
        if (p > task.first) REQUIRE(piece.source >= end_of(schedule.pieces[p - 1]));
        REQUIRE(end_of(piece) - first.source <= policy.block_bytes);
        if (p > task.first) REQUIRE(piece.source - end_of(schedule.pieces[p - 1]) <= policy.request_cost);
      }
    }
    REQUIRE(next == schedule.pieces.size());
    Trace expected(memory);
    for (const Piece& box : boxes) {
      if (box.loops.empty()) continue;
      expected.add(box.file, box.loops, 0, box.source, box.destination);
    }
    REQUIRE((actual.times == expected.times));  // once each: the boxes of a load do not share destinations here
    REQUIRE((actual.sources == expected.sources));
  }
}

TEST_CASE("tasks ascend by file and offset") {
  Random random(81);
  std::string memory;
  for (int i = 0; i < 500; ++i) {
    const auto policies = policies_for(random, 3);
    const Schedule schedule = make_schedule(random_boxes(random, memory, 3), policies);
    for (size_t t = 1; t < schedule.tasks.size(); ++t) {
      const Task& before = schedule.tasks[t - 1];
      const Task& task = schedule.tasks[t];
      const bool ascends = before.range.file < task.range.file ||
                           (before.range.file == task.range.file &&
                            schedule.pieces[before.first].source <= schedule.pieces[task.first].source);
      REQUIRE(ascends);
    }
  }
}

TEST_CASE("small neighbours are joined") {
  for (const bool direct : {false, true}) {
    const Policy policy{8192, 1 << 20, direct, 1 << 20};
    std::vector<Piece> boxes;
    for (int64_t i = 0; i < 256; ++i) {
      Piece box;
      box.source = 1000 + i * (4096 + 1500);  // 4 KiB of payload, and the ends of two archives between
      box.item = static_cast<size_t>(i);
      box.loops = {{4096, 1, 1}};
      boxes.push_back(box);
    }
    Random(82).shuffle(boxes);
    const Schedule schedule = make_schedule(boxes, {policy});
    CHECK(schedule.tasks.size() <= 3);
    for (size_t t = 0; t + 1 < schedule.tasks.size(); ++t) CHECK(schedule.tasks[t].count >= 64);
  }
}

TEST_CASE("large contiguous boxes are read straight into place, block by block") {
  std::vector<Piece> boxes(1);
  boxes[0].loops = {{10 * kBlock + 5, 1, 1}};
  const Schedule schedule = make_schedule(boxes, {{16, kBlock, false, kBlock}});
  REQUIRE(schedule.tasks.size() == 11);
  for (const Task& task : schedule.tasks) CHECK(task.count == 1);
  CHECK(schedule.pieces.back().source == 10 * kBlock);
  CHECK(schedule.pieces.back().loops == box::Loops{{5, 1, 1}});
}

TEST_CASE("contiguous boxes come in larger requests than others where they need no memory to pass through") {
  std::vector<Piece> boxes(2);
  boxes[0].loops = {{10 * kBlock, 1, 1}};
  boxes[1].source = 1 << 20;
  boxes[1].loops = {{10 * kBlock / 64, 66, 64}, {64, 1, 1}};
  const Schedule schedule = make_schedule(boxes, {{16, kBlock, false, 5 * kBlock}});
  REQUIRE(schedule.pieces.size() == 2 + 11);
  CHECK(schedule.pieces[0].loops == box::Loops{{5 * kBlock, 1, 1}});
  CHECK(schedule.tasks[0].count == 1);
  CHECK(schedule.tasks[1].count == 1);
}

TEST_CASE("neighbours share blocks, which are full where boxes are cut for it") {
  constexpr int64_t kBytes = 1 << 20;
  for (const bool fills_blocks : {false, true}) {
    const Policy policy{4096, kBytes, true, kBytes, fills_blocks};
    std::vector<Piece> boxes(40);
    for (size_t i = 0; i < boxes.size(); ++i) {
      boxes[i].item = i;
      boxes[i].source = 777 + static_cast<int64_t>(i) * (kBytes * 9 / 8 + 1500);
      boxes[i].loops = {{kBytes * 9 / 8, 1, 1}};
    }
    Random(83).shuffle(boxes);
    const Schedule schedule = make_schedule(boxes, {policy});
    int64_t bytes = 0;
    for (const Piece& piece : schedule.pieces) bytes += piece.loops[0].size;
    CHECK(bytes == 40 * kBytes * 9 / 8);
    CHECK(schedule.tasks.size() == (fills_blocks ? 46 : 80));
    if (!fills_blocks) continue;
    for (size_t t = 0; t + 1 < schedule.tasks.size(); ++t) {
      const transfer::Range& range = schedule.tasks[t].range;
      CHECK(range.end - range.begin <= kBytes);
      CHECK(range.end - range.begin >= kBytes * 7 / 8);
    }
  }
}

TEST_CASE("a box far from the others has blocks of its own") {
  const Policy policy{4096, 1 << 20, true, 1 << 20, true};
  std::vector<Piece> boxes(4);
  for (size_t i = 0; i < boxes.size(); ++i) {
    boxes[i].item = i;
    boxes[i].file = i / 2;
    boxes[i].source = static_cast<int64_t>(i) * (1 << 20);
    boxes[i].loops = {{700000, 1, 1}};
  }
  const Schedule schedule = make_schedule(boxes, {policy, policy});
  REQUIRE(schedule.pieces.size() == 4);
  CHECK(schedule.tasks.size() == 4);
}

TEST_CASE("a read goes through gaps only where they are cheaper than a request") {
  const Policy policy{1000, 1 << 20, false, 1 << 20};
  CHECK_FALSE(policy.reads_through({{4096, 1, 1}}, 0));
  CHECK(Policy{1000, 1 << 20, true, 1 << 20}.reads_through({{4096, 1, 1}}, 0));
  CHECK(policy.reads_through({{10, 1100, 100}, {100, 1, 1}}, 0));
  CHECK_FALSE(policy.reads_through({{10, 1101, 100}, {100, 1, 1}}, 0));
  const box::Loops far_groups = {{3, 100000, 1000}, {10, 200, 100}, {100, 1, 1}};
  CHECK_FALSE(policy.reads_through(far_groups, 0));
  CHECK(policy.reads_through(far_groups, 1));
}

TEST_CASE("a box of small runs far apart is many tasks of few requests") {
  const auto most_requests = [](const Policy& policy, const box::Loops& loops) {
    std::vector<Piece> boxes(1);
    boxes[0].loops = loops;
    const Schedule schedule = make_schedule(boxes, {policy});
    int64_t most = 0;
    for (const Piece& piece : schedule.pieces) most = std::max(most, requests_for(policy, piece.loops));
    CHECK(schedule.tasks.size() == schedule.pieces.size());
    return most;
  };
  const Policy cached{8 << 10, 1 << 20, false, 1 << 20};
  const Policy direct{256 << 10, 1 << 20, true, 1 << 20};
  const box::Loops column = {{6000, 300 << 10, 4}, {4, 1, 1}};
  CHECK(most_requests(cached, column) == 127);
  CHECK(most_requests(direct, column) == 3);
  // The same where one request brings a few runs, and where a loop of loops does not.
  const box::Loops groups = {{6000, 300 << 10, 40}, {10, 1000, 4}, {4, 1, 1}};
  CHECK(most_requests(cached, groups) < 127);
  CHECK(most_requests(cached, groups) > 50);
  const box::Loops planes = {{60, 30 << 20, 400}, {100, 300 << 10, 4}, {4, 1, 1}};
  CHECK(most_requests(cached, planes) == 100);
  CHECK(most_requests(direct, planes) == 3);
}

TEST_CASE("nothing makes an empty schedule") {
  CHECK(make_schedule({}, {}).tasks.empty());
  CHECK(make_schedule(std::vector<Piece>(3), {{1, kBlock, false, kBlock}}).tasks.empty());
}

TEST_CASE("each rank of a node begins at a place of its own, and goes around") {
  const auto order_of = [](std::vector<int64_t> sizes, const transfer::Node& node) {
    begin_at_own_place(sizes, node, [](int64_t size) { return size; });
    return sizes;
  };
  using Sizes = std::vector<int64_t>;
  const Sizes even = {10, 11, 12, 13, 14, 15, 16, 17};
  CHECK(order_of(even, {1, 0}) == even);
  CHECK(order_of(even, {8, 0}) == even);
  CHECK(order_of(even, {2, 1}) == Sizes{15, 16, 17, 10, 11, 12, 13, 14});
  CHECK(order_of(even, {8, 7}) == Sizes{17, 10, 11, 12, 13, 14, 15, 16});
  // By bytes, not by tasks.
  CHECK(order_of({100, 1, 1, 1, 1}, {2, 1}) == Sizes{1, 1, 1, 1, 100});
  CHECK(order_of({1, 1, 1, 1, 100}, {2, 1}) == Sizes{100, 1, 1, 1, 1});
  CHECK(order_of({}, {8, 5}).empty());
  CHECK(order_of({0, 0}, {8, 5}) == Sizes{0, 0});

  // Ranks that want the same divide it: each has read about as much when it comes to where the next one began.
  Random random(77);
  for (int i = 0; i < 100; ++i) {
    const int ranks = static_cast<int>(random.between(1, 16));
    Sizes sizes;
    int64_t all = 0;
    for (int64_t task = random.between(1, 200); task > 0; --task) {
      sizes.push_back(1000 * task + random.between(1, 100));
      all += sizes.back();
    }
    const int64_t largest = *std::max_element(sizes.begin(), sizes.end());
    for (int rank = 0; rank < ranks; ++rank) {
      const Sizes order = order_of(sizes, {ranks, rank});
      const auto begin = std::find(sizes.begin(), sizes.end(), order.front());  // no two are equal
      int64_t before = 0;
      for (auto size = sizes.begin(); size != begin; ++size) before += *size;
      const double wanted = static_cast<double>(all) * rank / ranks;
      const double distance = std::abs(static_cast<double>(before) - wanted);
      REQUIRE(std::min(distance, static_cast<double>(all) - distance) <= static_cast<double>(largest) / 2);
      Sizes turned = sizes;
      std::rotate(turned.begin(), turned.begin() + (begin - sizes.begin()), turned.end());
      REQUIRE(order == turned);
    }
  }
}
