// Bytes that go to other nodes: each node gets them once, and its ranks pass them on.

#include <algorithm>
#include <chrono>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "doctest/doctest.h"
#include "exchange/jobs.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using exchange::Assignment;
using exchange::CommonNeed;
using exchange::JobNeeds;
using exchange::Need;
using exchange::NeededBox;

namespace {

constexpr int64_t kTensor = 16 * kMiB;

// Which part of each matrix and which part of each vector a rank needs, and how many parts there are.
struct Place {
  int64_t matrix = 0;
  int64_t matrix_parts = 1;
  int64_t vector = 0;
  int64_t vector_parts = 1;
  bool has_own_tensor = false;
};

// One matrix by rows and one vector for each layer.
template <typename PlaceOf>
Job model(int64_t ranks, int64_t ranks_per_node, int64_t layers, const PlaceOf& place_of) {
  constexpr int64_t kVector = 64 << 10;
  Job job;
  std::vector<std::vector<int64_t>> known;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const Place place = place_of(rank);
    const std::vector<int64_t> key = {place.matrix, place.vector, place.has_own_tensor ? rank : -1};
    const auto found = std::find(known.begin(), known.end(), key);
    job.ranks.needs.push_back(static_cast<uint32_t>(found - known.begin()));
    job.ranks.nodes.push_back(rank / ranks_per_node);
    if (found != known.end()) continue;
    known.push_back(key);
    Need need({{"file", (layers + 1) * (kTensor + kVector + kRecordGap) + ranks * 128, 0}});
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t at = layer * (kTensor + kVector + kRecordGap);
      const int64_t of_matrix = kTensor / place.matrix_parts;
      const int64_t of_vector = kVector / place.vector_parts;
      need.add(0, at + place.matrix * of_matrix, rows(of_matrix), 4);
      need.add(0, at + kTensor + place.vector * of_vector, rows(of_vector), 4);
    }
    if (place.has_own_tensor) need.add(0, layers * (kTensor + kVector + kRecordGap) + rank * 128, rows(128), 1);
    need.number_files({0});
    job.needs.push_back(std::move(need));
  }
  return job;
}

Place whole(int64_t /*rank*/) { return {}; }

// Bytes between nodes for each byte of the checkpoint.
double between(const Assignment& assignment, int64_t layers) {
  return static_cast<double>(assignment.traffic().between_nodes) / static_cast<double>(layers * (kTensor + (64 << 10)));
}

}  // namespace

TEST_CASE("relays: what ranks have in common is all that each of them needs, and no more") {
  Random random(61);
  for (int i = 0; i < 300; ++i) {
    CAPTURE(i);
    Job job;
    const auto count = static_cast<size_t>(random.between(1, 6));
    for (size_t n = 0; n < count; ++n) {
      Need need({{"x", 1 << 20, 0}});
      for (int64_t boxes = random.between(0, 9); boxes > 0; --boxes) {
        const int64_t begin = 100 * random.between(0, 4);
        if (random.chance(50)) {
          need.add(0, begin, rows(4 * random.between(1, 2)), random.chance(90) ? 4 : 1);
        } else {
          need.add(0, begin, columns(random.between(2, 3), random.pick(Ints{12, 16}), 4), 4);
        }
      }
      need.number_files({0});
      job.needs.push_back(std::move(need));
    }
    const auto ranks = static_cast<uint32_t>(count) + static_cast<uint32_t>(random.between(0, 6));
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      // Each need is one of some rank.
      job.ranks.needs.push_back(rank < count ? rank : static_cast<uint32_t>(random.below(count)));
      job.ranks.nodes.push_back(random.between(5, 8));
    }
    const uint32_t own_rank = static_cast<uint32_t>(random.below(ranks));
    const uint32_t own = job.ranks.needs[own_rank];
    const JobNeeds found = exchange::needs_of_job(job.needs, job.ranks, own);
    using Box = std::tuple<uint32_t, int64_t, int64_t, int32_t, std::vector<int64_t>>;
    const auto box_of = [](const Need& need, const NeededBox& box) {
      std::vector<int64_t> loops;
      for (uint32_t dim = 0; dim < box.depth; ++dim) {
        loops.push_back(need.loops(box)[dim].size);
        loops.push_back(need.loops(box)[dim].source_stride);
      }
      return Box(box.file, box.begin, box.end, box.grain, loops);
    };
    std::set<std::vector<uint32_t>> seen;
    std::vector<std::multiset<Box>> of_rank(ranks);
    std::set<uint32_t> numbers;
    for (const CommonNeed& common : found.needs) {
      REQUIRE(seen.insert(common.ranks).second);
      uint32_t at = 0;
      for (const exchange::Group& group : common.groups) {
        REQUIRE(group.begin == at);
        for (; at < group.end; ++at) REQUIRE(found.nodes[common.ranks[at]] == group.node);
      }
      REQUIRE(at == common.ranks.size());
      for (const NeededBox& box : common.need.boxes()) {
        for (const uint32_t rank : common.ranks) of_rank[rank].insert(box_of(common.need, box));
        if (std::count(common.ranks.begin(), common.ranks.end(), own_rank) == 0) continue;
        // Its number is that of the box in the need of this rank.
        REQUIRE(numbers.insert(box.number).second);
        const auto& boxes = job.needs[own].boxes();
        const auto same = std::find_if(boxes.begin(), boxes.end(),
                                       [&](const NeededBox& other) { return other.number == box.number; });
        REQUIRE(same != boxes.end());
        REQUIRE(box_of(job.needs[own], *same) == box_of(common.need, box));
      }
    }
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      const Need& need = job.needs[job.ranks.needs[rank]];
      std::multiset<Box> expected;
      for (const NeededBox& box : need.boxes()) expected.insert(box_of(need, box));
      REQUIRE(of_rank[rank] == expected);
    }
  }
}

TEST_CASE("relays: a node gets each byte once, and its ranks pass on equally much") {
  for (const int64_t ranks : {16, 30}) {  // the last of the nodes has fewer
    const Job job = model(ranks, 8, 40, whole);
    const Assignment relayed = assign(job, kLimits);
    const Assignment direct = assign(job, kLimits, kDearRounds);
    check(job, relayed, kLimits);
    const int64_t nodes = (ranks + 7) / 8;
    CHECK(between(relayed, 40) == doctest::Approx(static_cast<double>(nodes - 1)));
    const std::vector<int64_t> sent = relayed.traffic().sent;
    for (int64_t node = 0; node < nodes; ++node) {
      const auto begin = sent.begin() + 8 * node;
      const auto end = sent.begin() + std::min(ranks, 8 * node + 8);
      CHECK(static_cast<double>(*std::max_element(begin, end)) <=
            1.1 * static_cast<double>(*std::min_element(begin, end)));
    }
    // Rounds are as full as without relays.
    CHECK(relayed.rounds() <= direct.rounds() * 11 / 10 + exchange::kRelayRounds);
  }
}

TEST_CASE("relays: little is sent to all ranks at once, as that takes fewer rounds") {
  const exchange::Network network;
  Job job = job_of(1, 1, kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(64 << 10), 4); });
  job.ranks = {std::vector<uint32_t>(32, 0), {}};
  for (int64_t rank = 0; rank < 32; ++rank) job.ranks.nodes.push_back(rank / 8);
  job.needs[0].number_files({0});
  const Assignment little = assign(job, kLimits, network);
  CHECK(little.rounds() == 1);
  CHECK(little.traffic().between_nodes == 24 * (64 << 10));
  const Job larger = model(32, 8, 4, whole);
  const Assignment much = assign(larger, kLimits, network);
  CHECK(between(much, 4) == doctest::Approx(3));
}

TEST_CASE("relays: the cost of an exchange") {
  const exchange::Network network{1e9, 1e10, 1e-3};
  CHECK(exchange::seconds(network, {8'000'000'000, 0, 0}, 16, 4) == doctest::Approx(2));
  CHECK(exchange::seconds(network, {0, 8'000'000'000, 0}, 16, 4) == doctest::Approx(0.2));
  CHECK(exchange::seconds(network, {0, 0, 2}, 16, 4) == doctest::Approx(0.03));
}

TEST_CASE("relays: from 8 to 4,096 ranks on nodes of 8") {
  struct Layout {
    std::string name;
    Place (*place_of)(int64_t rank);
    // Bytes between nodes for each byte of the checkpoint.
    double (*direct)(double nodes);
    double (*relayed)(double nodes);
  };
  constexpr double kVectors = 64.0 / (64 + 16 * 1024);  // of all bytes
  const std::vector<Layout> layouts = {
      {"replicas", whole, [](double nodes) { return 8 * (nodes - 1); }, [](double nodes) { return nodes - 1; }},
      {"replicas with a tensor of each rank's own", [](int64_t) { return Place{0, 1, 0, 1, true}; },
       [](double nodes) { return 8 * (nodes - 1); }, [](double nodes) { return nodes - 1; }},
      {"HSDP, 2 replicas on each node", [](int64_t rank) { return Place{rank % 4, 4, rank % 4, 4}; },
       [](double nodes) { return 2 * (nodes - 1); }, [](double nodes) { return nodes - 1; }},
      {"HSDP, a replica is a node", [](int64_t rank) { return Place{rank % 8, 8, rank % 8, 8}; },
       [](double nodes) { return nodes - 1; }, [](double nodes) { return nodes - 1; }},
      {"tensor parallel in nodes, replicas across them", [](int64_t rank) { return Place{rank % 8, 8, 0, 1}; },
       [](double nodes) { return (1 - kVectors + 8 * kVectors) * (nodes - 1); },
       [](double nodes) { return nodes - 1; }},
  };
  for (const int64_t ranks : {8, 64, 512, 4096}) {
    const int64_t layers = ranks == 4096 ? 2 : 8;
    const auto nodes = static_cast<double>(ranks / 8);
    for (const Layout& layout : layouts) {
      CAPTURE(layout.name);
      CAPTURE(ranks);
      const Job job = model(ranks, 8, layers, layout.place_of);
      const Assignment relayed = assign(job, kLimits);
      const Assignment direct = assign(job, kLimits, kDearRounds);
      CHECK(between(direct, layers) == doctest::Approx(layout.direct(nodes)).epsilon(0.01));
      CHECK(between(relayed, layers) == doctest::Approx(layout.relayed(nodes)).epsilon(0.01));
      CHECK(relayed.rounds() <= direct.rounds() * 5 / 4 + exchange::kRelayRounds);
    }
  }
}

TEST_CASE("relays: rounds of a large checkpoint are full") {
  constexpr int64_t kBytes = 280'000'000;
  constexpr int64_t kTensors = 50;
  Job job = job_of(1, kTensors, kBytes, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(kBytes), 4); });
  job.needs[0].number_files({0});
  job.ranks = {std::vector<uint32_t>(512, 0), {}};
  for (int64_t rank = 0; rank < 512; ++rank) job.ranks.nodes.push_back(rank / 8);
  const Assignment assignment = assign(job, kLimits);
  CHECK(static_cast<double>(assignment.rounds()) <=
        1.05 * kTensors * kBytes / static_cast<double>(kLimits.receive_bytes));
}

TEST_CASE("relays: what is the same of different needs takes no memory for each of them") {
  const Job job = model(512, 8, 30, [](int64_t) { return Place{0, 1, 0, 1, true}; });
  const Assignment assignment = assign(job, kLimits);
  size_t shares = 0;
  for (size_t i = 0; i < assignment.units().size(); ++i) {
    const auto [first, last] = assignment.shares(i);
    shares += static_cast<size_t>(last - first);
  }
  CHECK(shares <= assignment.units().size() + 512);
}
