#include "exchange/assignment.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using exchange::Assignment;
using exchange::Need;
using exchange::NeededBox;
using exchange::RoundLimits;
using exchange::Share;
using exchange::Unit;

namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kRecordGap = 1345;  // of headers between payloads

box::Loops rows(int64_t bytes) { return {{bytes, 1, 1}}; }
box::Loops columns(int64_t row_count, int64_t row_bytes, int64_t column_bytes) {
  return {{row_count, row_bytes, column_bytes}, {column_bytes, 1, 1}};
}

struct Job {
  std::vector<Need> needs;
  exchange::Ranks ranks;

  // Every rank of its own need.
  void each_its_own(int64_t nodes = 1) {
    for (uint32_t i = 0; i < needs.size(); ++i) {
      ranks.needs.push_back(i);
      ranks.nodes.push_back(i / (static_cast<int64_t>(needs.size()) / nodes));
    }
    for (Need& need : needs) need.number_files({0});
  }
};

// Tensors of a checkpoint of one file, of which each rank needs what `loops` says.
template <typename Add>
Job job_of(size_t needs, int64_t tensors, int64_t tensor_bytes, const Add& add) {
  Job job;
  for (size_t rank = 0; rank < needs; ++rank) {
    Need need({{"file", tensors * (tensor_bytes + kRecordGap), 0}});
    for (int64_t i = 0; i < tensors; ++i) add(need, rank, i * (tensor_bytes + kRecordGap));
    job.needs.push_back(std::move(need));
  }
  return job;
}

// What must hold for any assignment. Returns the bytes that are read.
int64_t check(const Job& job, const Assignment& assignment, const RoundLimits& limits) {
  REQUIRE(assignment.obstacle().empty());
  const auto& units = assignment.units();
  std::vector<int64_t> of_need(job.needs.size(), 0);
  for (size_t i = 0; i < units.size(); ++i) {
    const Unit& unit = units[i];
    if (i > 0) REQUIRE((units[i - 1].file < unit.file || units[i - 1].end <= unit.begin));
    bool owner_needs_it = false;
    const auto [begin, end] = assignment.shares(i);
    REQUIRE(begin != end);
    for (const Share* share = begin; share != end; ++share) {
      const Need& need = job.needs[share->need];
      int64_t bytes = 0;
      need.each_within(unit.file, unit.begin, unit.end, [&](const NeededBox& box) {
        bytes += need.bytes_within(box, unit.begin, unit.end);
        const auto cuts_an_element = [&](int64_t position) {
          return position > box.begin && position < box.end && (position - box.begin) % box.grain != 0;
        };
        REQUIRE((!cuts_an_element(unit.begin) && !cuts_an_element(unit.end)));
      });
      REQUIRE(bytes == share->bytes);
      of_need[share->need] += bytes;
      owner_needs_it = owner_needs_it || job.ranks.needs[unit.owner] == share->need;
    }
    // Small pieces go with their neighbours.
    if (unit.end - unit.begin > 128 << 10) REQUIRE(owner_needs_it);
  }
  for (size_t i = 0; i < job.needs.size(); ++i) {
    int64_t bytes = 0;
    for (const NeededBox& box : job.needs[i].boxes()) bytes += job.needs[i].bytes_within(box, box.begin, box.end);
    REQUIRE(of_need[i] == bytes);
  }
  size_t seen = 0;
  for (uint32_t round = 0; round < assignment.rounds(); ++round) {
    const auto [begin, end] = assignment.units_of_round(round);
    seen += static_cast<size_t>(end - begin);
    std::vector<int64_t> sent(job.ranks.needs.size(), 0);
    std::vector<int64_t> received(job.ranks.needs.size(), 0);
    int64_t most_sent = 0;  // of one unit
    int64_t most_received = 0;
    for (const uint32_t* unit = begin; unit != end; ++unit) {
      REQUIRE(units[*unit].round == round);
      const auto [first, last] = assignment.shares(*unit);
      int64_t of_unit = 0;
      for (const Share* share = first; share != last; ++share) {
        for (size_t rank = 0; rank < received.size(); ++rank) {
          if (job.ranks.needs[rank] != share->need) continue;
          received[rank] += share->bytes;
          of_unit += share->bytes;
          most_received = std::max<int64_t>(most_received, share->bytes);
        }
      }
      sent[units[*unit].owner] += of_unit;
      most_sent = std::max(most_sent, of_unit);
    }
    // A unit that is larger than a round comes first in it.
    REQUIRE(*std::max_element(sent.begin(), sent.end()) <= std::max(limits.send_bytes, most_sent));
    REQUIRE(*std::max_element(received.begin(), received.end()) <= std::max(limits.receive_bytes, most_received));
  }
  REQUIRE(seen == units.size());
  return std::accumulate(assignment.read_bytes().begin(), assignment.read_bytes().end(), int64_t{0});
}

double imbalance(const Assignment& assignment) {
  const std::vector<int64_t>& bytes = assignment.read_bytes();
  const auto most = static_cast<double>(*std::max_element(bytes.begin(), bytes.end()));
  return most * static_cast<double>(bytes.size()) /
         static_cast<double>(std::accumulate(bytes.begin(), bytes.end(), int64_t{0}));
}

const RoundLimits kLimits{32 * kMiB, 32 * kMiB};

}  // namespace

TEST_CASE("random needs: each byte has a place in a unit, and each unit one in a round") {
  Random random(60);
  for (int i = 0; i < 300; ++i) {
    CAPTURE(i);
    Job job;
    const auto count = static_cast<size_t>(random.between(1, 6));
    const Ints offsets = {0, 7, 300000, 300013};
    std::vector<Ints> sizes;
    for (size_t record = 0; record < offsets.size(); ++record)
      sizes.push_back({random.between(1, 40), 1 << random.between(0, 10)});
    for (size_t n = 0; n < count; ++n) {
      Need need({{"x", 1 << 22, 0}});
      for (int64_t boxes = random.between(0, 6); boxes > 0; --boxes) {
        // Boxes of one record, or of several that do not overlap.
        const int64_t record = random.between(0, 1) * 2;
        const Ints& shape = sizes[static_cast<size_t>(record)];
        const int64_t columns_of = random.between(1, shape[1]);
        const int64_t first = random.between(0, shape[1] - columns_of);
        const int64_t row_count = random.between(1, shape[0]);
        const int64_t row = random.between(0, shape[0] - row_count);
        need.add(0, offsets[static_cast<size_t>(record)] + 4 * (row * shape[1] + first),
                 box::collapse({row_count, columns_of}, {shape[1], 1}, {columns_of, 1}, 4), 4);
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
    check(job, Assignment(job.needs, job.ranks, limits), limits);
  }
}

TEST_CASE("replicas read equal parts, each byte once") {
  Job job = job_of(1, 40, 10 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(10 * kMiB), 4); });
  job.each_its_own();
  job.ranks = {std::vector<uint32_t>(8, 0), std::vector<int64_t>(8, 0)};
  const Assignment assignment(job.needs, job.ranks, kLimits);
  CHECK(check(job, assignment, kLimits) == 400 * kMiB);
  CHECK(imbalance(assignment) <= 1.1);
}

TEST_CASE("a rank gets over the network what it needs and does not read") {
  Job job = job_of(1, 40, 10 * kMiB, [](Need& need, size_t, int64_t at) { need.add(0, at, rows(10 * kMiB), 4); });
  job.each_its_own();
  job.ranks = {{0, 0, 0, 0}, {1, 1, 2, 2}};
  const Assignment assignment(job.needs, job.ranks, kLimits);
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
  const Assignment assignment(job.needs, job.ranks, kLimits);
  CHECK(check(job, assignment, kLimits) == 320 * kMiB);
  CHECK(imbalance(assignment) <= 1.1);
}

TEST_CASE("each rank reads what it alone needs") {
  Job job = job_of(4, 20, 16 * kMiB, [](Need& need, size_t rank, int64_t at) {
    need.add(0, at + static_cast<int64_t>(rank) * 4 * kMiB, rows(4 * kMiB), 8);
  });
  job.each_its_own();
  const Assignment assignment(job.needs, job.ranks, kLimits);
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
  const Assignment assignment(job.needs, job.ranks, kLimits);
  check(job, assignment, kLimits);
  const std::vector<int64_t>& bytes = assignment.read_bytes();
  CHECK(bytes[0] + bytes[1] + bytes[2] + bytes[3] == doctest::Approx(64 * kMiB).epsilon(0.1));
}

TEST_CASE("records that overlap are not shared") {
  Job job = job_of(1, 1, kMiB, [](Need& need, size_t, int64_t) {
    need.add(0, 0, rows(4000), 4);
    need.add(0, 1001, rows(4000), 4);
  });
  job.each_its_own();
  CHECK(Assignment(job.needs, job.ranks, kLimits).obstacle() == "records of the checkpoint overlap");
}

TEST_CASE("a box of bytes that ends within an element of another box is not shared") {
  Job job = job_of(1, 1, kMiB, [](Need& need, size_t, int64_t) {
    need.add(0, 0, rows(4000), 4);
    need.add(0, 100, rows(1901), 1);
  });
  job.each_its_own();
  CHECK(Assignment(job.needs, job.ranks, kLimits).obstacle() == "records of the checkpoint overlap");
}

TEST_CASE("no more is sent in a round than there is memory for, however unevenly needs are spread") {
  constexpr int64_t kFar = int64_t{1} << 30;
  for (const int64_t bytes : {4 * kMiB, kFar - 1}) {
    Job job = job_of(1, 1, 3 * kFar,
                     [bytes](Need& need, size_t, int64_t) { need.add(0, 0, {{2, kFar, bytes}, {bytes, 1, 1}}, 1); });
    job.each_its_own();
    job.ranks = {std::vector<uint32_t>(512, 0), std::vector<int64_t>(512, 0)};
    const Assignment assignment(job.needs, job.ranks, kLimits);
    check(job, assignment, kLimits);
    for (size_t i = 0; i < assignment.units().size(); ++i) {
      const auto [first, last] = assignment.shares(i);
      REQUIRE(first->bytes * int64_t{512} <= kLimits.send_bytes);
    }
  }
}

TEST_CASE("a job of 512 ranks and 1,000 tensors is assigned in seconds") {
  Job job = job_of(512, 1000, 64 * kMiB, [](Need& need, size_t rank, int64_t at) {
    need.add(0, at + static_cast<int64_t>(rank) * 128 * 1024, rows(128 * 1024), 4);
  });
  job.each_its_own(64);
  const auto begin = std::chrono::steady_clock::now();
  const Assignment assignment(job.needs, job.ranks, kLimits);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  MESSAGE("seconds: ", seconds.count());
  CHECK(imbalance(assignment) <= 1.1);
  CHECK(seconds.count() < 30);  // with sanitizers
}
