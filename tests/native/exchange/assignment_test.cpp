#include "exchange/assignment.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "exchange/jobs.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using exchange::Assignment;
using exchange::Need;
using exchange::RoundLimits;

TEST_CASE("random needs: each byte has a place in a unit, and each unit one in a round") {
  Random random(60);
  int with_relays = 0;
  for (int i = 0; i < 600; ++i) {
    CAPTURE(i);
    Job job;
    const auto count = static_cast<size_t>(random.between(1, 6));
    const Ints offsets = {0, 7, 300000, 300013};
    std::vector<Ints> sizes;
    for (size_t record = 0; record < offsets.size(); ++record)
      sizes.push_back({random.between(1, 40), 1 << random.between(0, 10)});
    std::vector<std::pair<int64_t, box::Loops>> added;
    for (size_t n = 0; n < count; ++n) {
      Need need({{"x", 1 << 22, 0}});
      for (int64_t boxes = random.between(0, 6); boxes > 0; --boxes) {
        // Ranks often need the same box, and some need it twice.
        if (!added.empty() && random.chance(40)) {
          const auto& [begin, loops] = added[random.below(added.size())];
          need.add(0, begin, loops, 4);
          continue;
        }
        // Boxes of one record, or of several that do not overlap.
        const int64_t record = random.between(0, 1) * 2;
        const Ints& shape = sizes[static_cast<size_t>(record)];
        const int64_t columns_of = random.between(1, shape[1]);
        const int64_t first = random.between(0, shape[1] - columns_of);
        const int64_t row_count = random.between(1, shape[0]);
        const int64_t row = random.between(0, shape[0] - row_count);
        added.emplace_back(offsets[static_cast<size_t>(record)] + 4 * (row * shape[1] + first),
                           box::collapse({row_count, columns_of}, {shape[1], 1}, {columns_of, 1}, 4));
        need.add(0, added.back().first, added.back().second, 4);
      }
      need.number_files({0});
      job.needs.push_back(std::move(need));
    }
    for (int64_t rank = random.between(1, 9); rank > 0; --rank) {
      job.ranks.needs.push_back(static_cast<uint32_t>(random.below(count)));
      job.ranks.nodes.push_back(random.between(0, 2));
    }
    // A need that no rank has does not exist.
    std::set<uint32_t> used(job.ranks.needs.begin(), job.ranks.needs.end());
    for (uint32_t n = 0; n < count; ++n) {
      if (used.insert(n).second) {
        job.ranks.needs.push_back(n);
        job.ranks.nodes.push_back(0);
      }
    }
    const RoundLimits limits{random.pick(Ints{1 << 12, 1 << 16, 32 << 20}),
                             random.pick(Ints{1 << 12, 1 << 16, 32 << 20})};
    const Assignment relayed = assign(job, limits);
    const Assignment direct = assign(job, limits, kDearRounds);
    check(job, relayed, limits);
    check(job, direct, limits);
    CHECK(relayed.traffic().between_nodes <= direct.traffic().between_nodes);
    with_relays += relayed.traffic().between_nodes < direct.traffic().between_nodes;
  }
  CHECK(with_relays > 100);
}

TEST_CASE("replicas read equal parts, each byte once") {
  Job job = job_of(1, 40, 10 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(10 * kMiB), 4); });
  job.each_its_own();
  job.ranks = {std::vector<uint32_t>(8, 0), std::vector<int64_t>(8, 0)};
  const Assignment assignment = assign(job, kLimits);
  CHECK(check(job, assignment, kLimits) == 400 * kMiB);
  CHECK(imbalance(assignment) <= 1.1);
}

TEST_CASE("a rank gets over the network what it needs and does not read") {
  Job job = job_of(1, 40, 10 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(10 * kMiB), 4); });
  job.each_its_own();
  job.ranks = {{0, 0, 0, 0}, {1, 1, 2, 2}};
  const Assignment assignment = assign(job, kLimits, kDearRounds);
  const exchange::Traffic traffic = assignment.traffic();
  for (size_t rank = 0; rank < 4; ++rank) {
    CHECK(traffic.received[rank] == 400 * kMiB - assignment.read_bytes()[rank]);
    CHECK(traffic.sent[rank] == 3 * assignment.read_bytes()[rank]);
  }
  CHECK(traffic.between_nodes == 2 * 400 * kMiB);
}

TEST_CASE("columns of rows that others read are read once, and sent sliced") {
  Job job = job_of(8, 20, 16 * kMiB, [](Need& need, size_t rank, int64_t at) {
    need.add(0, at + static_cast<int64_t>(rank) * 1024, columns(2048, 8192, 1024), 4);
  });
  job.each_its_own();
  const Assignment assignment = assign(job, kLimits);
  CHECK(check(job, assignment, kLimits) == 320 * kMiB);
  CHECK(imbalance(assignment) <= 1.1);
}

TEST_CASE("columns of rows that are longer than units are read by the ranks that need them") {
  constexpr int64_t kRow = 64 * kMiB;
  Job job = job_of(4, 2, 3 * kRow, [&](Need& need, size_t rank, int64_t at) {
    need.add(0, at + static_cast<int64_t>(rank) * kRow / 4, columns(3, kRow, kRow / 4), 4);
  });
  job.each_its_own();
  const Assignment assignment = assign(job, kLimits);
  CHECK(check(job, assignment, kLimits) == 6 * kRow);
  const std::vector<int64_t> sent = assignment.traffic().sent;
  CHECK(std::accumulate(sent.begin(), sent.end(), int64_t{0}) <= kRow);  // of units across a border of columns
  CHECK(imbalance(assignment) <= 1.1);
}

TEST_CASE("a small piece makes nobody the owner of what follows its neighbour") {
  Random random(64);
  for (int i = 0; i < 100; ++i) {
    CAPTURE(i);
    // Boxes that overlap in part, of any size, and ranks that need some of them.
    const int64_t size = random.pick(Ints{5000, 300000, 3 * kMiB, 40 * kMiB});
    Job job;
    std::vector<std::pair<int64_t, box::Loops>> boxes;
    for (int box = 0; box < 12; ++box) {
      const int64_t row = random.between(2, std::max<int64_t>(2, size / 400)) * 4;
      boxes.emplace_back(random.between(0, size / 8) * 4,
                         random.chance(60) ? rows(random.between(1, size / 8) * 4)
                                           : columns(random.between(2, 50), row, random.between(1, row / 4 - 1) * 4));
    }
    const auto count = static_cast<uint32_t>(random.between(2, 10));
    for (uint32_t n = 0; n < count; ++n) {
      Need need({{"x", 4 * size, 0}});
      for (const auto& [begin, loops] : boxes) {
        if (random.chance(50)) need.add(0, begin, loops, 4);
      }
      need.number_files({0});
      job.needs.push_back(std::move(need));
    }
    for (uint32_t rank = 0; rank < count + 9; ++rank) {
      job.ranks.needs.push_back(rank % count);
      job.ranks.nodes.push_back(random.chance(30) ? 0 : random.between(0, 5));
    }
    const Ints memory = {64 << 10, 256 << 10, 5 * kMiB};
    const RoundLimits limits{random.pick(memory), random.pick(memory)};
    check(job, assign(job, limits), limits);
  }
}

TEST_CASE("each rank reads what it alone needs") {
  Job job = job_of(4, 20, 16 * kMiB, [](Need& need, size_t rank, int64_t at) {
    need.add(0, at + static_cast<int64_t>(rank) * 4 * kMiB, rows(4 * kMiB), 8);
  });
  job.each_its_own();
  const Assignment assignment = assign(job, kLimits);
  CHECK(check(job, assignment, kLimits) == 320 * kMiB);
  for (size_t i = 0; i < assignment.units().size(); ++i) {
    const auto [begin, end] = assignment.shares(i);
    REQUIRE(end - begin == 1);
    CHECK(assignment.units()[i].owner == begin->need);
  }
}

TEST_CASE("the node that has least to read comes first") {
  Job job = job_of(1, 8, 16 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(16 * kMiB), 4); });
  job.each_its_own();
  job.ranks = {{0, 0, 0, 0, 0, 0}, {7, 7, 7, 7, 9, 9}};
  const Assignment assignment = assign(job, kLimits);
  check(job, assignment, kLimits);
  const std::vector<int64_t>& bytes = assignment.read_bytes();
  CHECK(bytes[0] + bytes[1] + bytes[2] + bytes[3] == doctest::Approx(64 * kMiB).epsilon(0.1));
}

TEST_CASE("many small exchanges in a row are read evenly, of whatever size their tensors are") {
  struct Load {
    size_t ranks;
    int64_t batch_bytes;
    int batches;
    size_t idle = 0;  // ranks that need nothing
  };
  Random random(65);
  for (const Load& load :
       {Load{8, kMiB, 200}, Load{8, kMiB, 200, 1}, Load{64, 4 * kMiB, 60}, Load{64, 64 * kMiB, 12}}) {
    CAPTURE(load.batch_bytes);
    Job job;
    job.ranks = {std::vector<uint32_t>(load.ranks, 0), {}, std::vector<int64_t>(load.ranks, 0)};
    for (size_t rank = 0; rank < load.ranks; ++rank) job.ranks.nodes.push_back(static_cast<int64_t>(rank / 8));
    std::fill_n(job.ranks.needs.begin(), load.idle, 1);
    std::vector<int64_t>& bytes = job.ranks.read_before;
    for (int batch = 0; batch < load.batches; ++batch) {
      Need need({{"file", 2 * load.batch_bytes, 0}});
      for (int64_t at = 0; at < load.batch_bytes;) {
        const int64_t size = std::min(random.pick(Ints{4000, 100000, 1000000, 16000000}), load.batch_bytes - at);
        need.add(0, at, rows(size), 4);
        at += size;
      }
      need.number_files({0});
      job.needs = {std::move(need), Need({})};
      const Assignment assignment = assign(job, kLimits);
      REQUIRE(check(job, assignment, kLimits) == load.batch_bytes);
      for (size_t rank = 0; rank < load.ranks; ++rank) bytes[rank] += assignment.read_bytes()[rank];
    }
    const auto total = static_cast<double>(load.batch_bytes * load.batches);
    CHECK(static_cast<double>(*std::max_element(bytes.begin(), bytes.end())) <=
          1.1 * total / static_cast<double>(load.ranks - load.idle));
  }
}

TEST_CASE("no rank makes up alone for what all others have read before") {
  Job job = job_of(1, 8, 16 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(16 * kMiB), 4); });
  job.each_its_own();
  constexpr int64_t kMuch = int64_t{1} << 40;
  job.ranks = {std::vector<uint32_t>(8, 0), {0, 0, 0, 0, 1, 1, 1, 1}, std::vector<int64_t>(8, kMuch)};
  job.ranks.read_before[3] = 0;
  CHECK(imbalance(assign(job, kLimits)) <= 1.1);
}

TEST_CASE("records that overlap are not shared") {
  Job job = job_of(1, 1, kMiB, [](Need& need, size_t, int64_t) {
    need.add(0, 0, rows(4000), 4);
    need.add(0, 1001, rows(4000), 4);
  });
  job.each_its_own();
  CHECK(assign(job, kLimits).obstacle() == "records of the checkpoint overlap");
}

TEST_CASE("a box of bytes that ends within an element of another box is not shared") {
  Job job = job_of(1, 1, kMiB, [](Need& need, size_t, int64_t) {
    need.add(0, 0, rows(4000), 4);
    need.add(0, 100, rows(1901), 1);
  });
  job.each_its_own();
  CHECK(assign(job, kLimits).obstacle() == "records of the checkpoint overlap");
}

TEST_CASE("no more is sent in a round than there is memory for, however unevenly needs are spread") {
  constexpr int64_t kFar = int64_t{1} << 30;
  for (const int64_t bytes : {4 * kMiB, kFar - 1}) {
    Job job = job_of(1, 1, 3 * kFar,
                     [bytes](Need& need, size_t, int64_t) { need.add(0, 0, {{2, kFar, bytes}, {bytes, 1, 1}}, 1); });
    job.each_its_own();
    job.ranks = {std::vector<uint32_t>(512, 0), std::vector<int64_t>(512, 0)};
    const Assignment assignment = assign(job, kLimits);
    check(job, assignment, kLimits);
    for (size_t i = 0; i < assignment.units().size(); ++i) {
      const auto [first, last] = assignment.shares(i);
      REQUIRE(first->bytes * int64_t{512} <= kLimits.send_bytes);
    }
  }
}

TEST_CASE("rounds are small where there are few bytes, unless there are many ranks") {
  const auto rounds_of = [](int64_t tensors, int64_t ranks) {
    Job job =
        job_of(1, tensors, 16 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(16 * kMiB), 4); });
    job.needs[0].number_files({0});
    job.ranks = {std::vector<uint32_t>(static_cast<size_t>(ranks), 0),
                 std::vector<int64_t>(static_cast<size_t>(ranks), 0)};
    const Assignment assignment = assign(job, kLimits);
    check(job, assignment, kLimits);
    return assignment.rounds();
  };
  CHECK(rounds_of(2, 8) == doctest::Approx(8).epsilon(0.2));     // of 4 MiB
  CHECK(rounds_of(16, 8) == doctest::Approx(32).epsilon(0.2));   // of 8 MiB
  CHECK(rounds_of(128, 8) == doctest::Approx(64).epsilon(0.2));  // of all that fits
  CHECK(rounds_of(16, 512) == doctest::Approx(8).epsilon(0.2));
}

TEST_CASE("a job of 512 ranks and 1,000 tensors is assigned evenly") {
  Job job = job_of(512, 1000, 64 * kMiB, [](Need& need, size_t rank, int64_t at) {
    need.add(0, at + static_cast<int64_t>(rank) * 128 * 1024, rows(128 * 1024), 4);
  });
  job.each_its_own(64);
  // What that takes, tests/python/ranks/test_assignment_budget.py looks at, without sanitizers.
  CHECK(imbalance(assign(job, kLimits)) <= 1.1);
}
