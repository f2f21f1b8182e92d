#include "exchange/exchange.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "transfer/random_load.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using exchange::Exchange;
using exchange::LocalNeed;
using exchange::Need;
using exchange::Receive;
using exchange::RoundLimits;
using exchange::RoundStats;
using exchange::Send;
using transfer::Item;
using transfer::Layouts;
using transfer::Options;
using transfer::Program;

namespace {

std::vector<std::string> names_of(const CheckpointFiles& files) {
  std::vector<std::string> names;
  for (size_t i = 0; i < files.paths.size(); ++i) names.push_back("file " + std::to_string(i));
  return names;
}

int64_t bytes_of(const CheckpointFiles& files) {
  size_t bytes = 0;
  for (const std::string& file : files.bytes) bytes += file.size();
  return static_cast<int64_t>(bytes);
}

int64_t sum(const std::vector<int64_t>& numbers) { return std::accumulate(numbers.begin(), numbers.end(), int64_t{0}); }

// One rank of a job whose ranks are all in this process.
struct Rank {
  Rank(RandomLoad& load, std::vector<Item> items, const Options& wanted, io::IoMode mode)
      : memory(load.before[0]), options(wanted), layouts(load.files.layouts(options, mode)) {
    load.place(0, data_of(memory));
    program = std::make_unique<Program>(layouts, std::move(items), load.destinations);
    local = std::make_unique<LocalNeed>(exchange::need_of(*program, 0, names_of(load.files)));
  }

  std::string memory;
  Options options;
  Layouts layouts;
  std::unique_ptr<Program> program;
  std::unique_ptr<LocalNeed> local;
  std::unique_ptr<Exchange> exchange;
  std::string sent[2];
  std::string received[2];
};

// Has all ranks come to an exchange, which is the same for all.
void agree(std::vector<std::unique_ptr<Rank>>& ranks, const RoundLimits& limits, int64_t nodes,
           const exchange::Network& network) {
  std::vector<std::vector<int64_t>> encoded;
  exchange::Ranks of_job;
  for (size_t i = 0; i < ranks.size(); ++i) {
    std::vector<int64_t> words = ranks[i]->local->need.encode();
    const auto found = std::find(encoded.begin(), encoded.end(), words);
    of_job.needs.push_back(static_cast<uint32_t>(found - encoded.begin()));
    of_job.nodes.push_back(static_cast<int64_t>(i) % nodes);
    if (found == encoded.end()) encoded.push_back(std::move(words));
  }
  for (size_t i = 0; i < ranks.size(); ++i) {
    std::vector<Need> needs;
    needs.reserve(encoded.size());
    for (const auto& words : encoded) needs.push_back(Need::decode(words.data(), words.size()));
    ranks[i]->exchange = std::make_unique<Exchange>(std::move(needs), of_job, static_cast<uint32_t>(i),
                                                    ranks[i]->local->need.files(), limits, network);
    REQUIRE(ranks[i]->exchange->rounds() == ranks[0]->exchange->rounds());
  }
}

RoundStats step(Rank& rank, std::optional<uint32_t> send, std::optional<uint32_t> receive) {
  std::optional<Send> to_send;
  std::optional<Receive> to_place;
  if (send) {
    rank.sent[*send % 2].assign(static_cast<size_t>(sum(rank.exchange->bytes_to_send(*send))), '?');
    to_send = Send{*send, data_of(rank.sent[*send % 2])};
  }
  if (receive) to_place = Receive{*receive, data_of(rank.received[*receive % 2])};
  return exchange::step(*rank.exchange, to_send, to_place, rank.layouts, *rank.local, rank.options, {}, never);
}

// What the collective call does.
void all_to_all(std::vector<std::unique_ptr<Rank>>& ranks, uint32_t round) {
  for (auto& rank : ranks) rank->received[round % 2].clear();
  for (auto& sender : ranks) {
    const std::vector<int64_t> sizes = sender->exchange->bytes_to_send(round);
    size_t begin = 0;
    for (size_t to = 0; to < ranks.size(); ++to) {
      const auto size = static_cast<size_t>(sizes[to]);
      ranks[to]->received[round % 2] += sender->sent[round % 2].substr(begin, size);
      begin += size;
    }
  }
  for (auto& rank : ranks) {
    REQUIRE(static_cast<int64_t>(rank->received[round % 2].size()) == sum(rank->exchange->bytes_to_receive(round)));
  }
}

}  // namespace

TEST_CASE("ranks that share reads get what each would get alone, and read every byte once") {
  Random random(70);
  int64_t rounds = 0;
  size_t moved = 0;
  for (int i = 0; i < 250; ++i) {
    CAPTURE(i);
    RandomLoad load(random, 1, i % 2 == 1);
    const Options options = random_options(random);
    const io::IoMode mode = random_mode(random);
    std::vector<std::unique_ptr<Rank>> ranks;
    std::vector<std::string> expected;
    const int64_t count = random.between(1, 8);
    std::vector<Item> items;
    for (int64_t rank = 0; rank < count; ++rank) {
      // Many ranks are replicas of the one before.
      if (rank == 0 || random.chance(60)) {
        items.clear();
        for (const Item& item : load.items) {
          if (random.chance(70)) items.push_back(item);
        }
      }
      ranks.push_back(std::make_unique<Rank>(load, items, options, mode));
      std::string alone = load.before[0];
      load.place(0, data_of(alone));
      const Program program(ranks.back()->layouts, items, load.destinations);
      transfer::run_wave(program, 0, options, {}, never);
      expected.push_back(std::move(alone));
    }
    // Little memory, but not thousands of rounds alike.
    const int64_t memory = std::max(random.pick(Ints{100, 5000, 1 << 20}), bytes_of(load.files) / 400);
    // Bytes go to other nodes by relays, or not.
    const exchange::Network network{3e9, 1e10, random.chance(70) ? 0 : 1e9};
    agree(ranks, {memory, memory}, random.between(1, 3), network);
    const uint32_t last = ranks[0]->exchange->rounds();
    rounds += last;
    std::vector<int64_t> read(ranks.size(), 0);
    for (uint32_t round = 0; round <= last + 1; ++round) {
      for (size_t number = 0; number < ranks.size(); ++number) {
        auto& rank = ranks[number];
        const std::optional<uint32_t> send = round < last ? std::optional(round) : std::nullopt;
        const std::optional<uint32_t> receive = round >= 2 ? std::optional(round - 2) : std::nullopt;
        const RoundStats stats = step(*rank, send, receive);
        moved += static_cast<size_t>(stats.placed.bytes_placed);
        read[number] += stats.bytes_read;
      }
      // The round that was packed just now: what is received in it is placed two steps later.
      if (round < last) all_to_all(ranks, round);
    }
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      REQUIRE(ranks[rank]->memory == expected[rank]);
      const Exchange& exchange = *ranks[rank]->exchange;
      if (!exchange.obstacle().empty()) continue;
      REQUIRE(exchange.bytes_to_read(ranks[rank]->layouts, options)[rank] == read[rank]);
      const exchange::Traffic traffic = exchange.assignment().traffic();
      const auto beyond = [&](std::vector<int64_t> (Exchange::*bytes)(uint32_t) const, int64_t foretold) {
        int64_t exchanged = 0;
        for (uint32_t round = 0; round < last; ++round) {
          const std::vector<int64_t> of_round = (exchange.*bytes)(round);
          exchanged += sum(of_round) - of_round[rank];
        }
        return exchanged - foretold;
      };
      // Memory for rounds holds headers too, unless it is little more than these take.
      if (memory >= 2 * count * 2 * exchange::kHeaderBytes) {
        for (uint32_t round = 0; round < last; ++round) {
          REQUIRE(sum(exchange.bytes_to_send(round)) <= memory);
          REQUIRE(sum(exchange.bytes_to_receive(round)) <= memory);
        }
      }
      // A header for each other rank, and what fills up the last one.
      const int64_t headers = last * (count - 1) * exchange::kHeaderBytes;
      for (const int64_t more : {beyond(&Exchange::bytes_to_send, traffic.sent[rank]),
                                 beyond(&Exchange::bytes_to_receive, traffic.received[rank])}) {
        REQUIRE((more >= headers && more <= 2 * headers));
      }
    }
  }
  CHECK(rounds > 2000);
  CHECK(moved > 1000000);
}

TEST_CASE("files that differ between ranks are not shared") {
  Random random(71);
  RandomLoad load(random);
  const Options options;
  Need mine({{"x", 100, 0}});
  Need other({{"x", 101, 0}});
  std::vector<Need> needs;
  for (Need* need : {&mine, &other}) {
    need->add(0, 0, {{10, 1, 1}}, 1);
    const std::vector<int64_t> words = need->encode();
    needs.push_back(Need::decode(words.data(), words.size()));
  }
  const Exchange exchange(std::move(needs), {{0, 1}, {0, 0}}, 0, mine.files(), {100, 100});
  CHECK(exchange.obstacle().find("ranks see different files") == 0);
  CHECK(exchange.rounds() == 0);
}

TEST_CASE("a relay needs what it has received") {
  Random random(73);
  CheckpointFiles files(1);
  files.add_random(random, 0, 0, {300, 300}, true);
  files.write();
  const Options options;
  const Layouts layouts = files.layouts(options, io::IoMode::kCached);
  Need need({{"x", 100000, 0}});
  need.add(0, 0, {{90000, 1, 1}}, 4);
  std::vector<Need> needs;
  const std::vector<int64_t> words = need.encode();
  needs.push_back(Need::decode(words.data(), words.size()));
  // The last rank passes on, or the one before it.
  const exchange::Network network{3e9, 1e10, 0};
  int relays = 0;
  for (const uint32_t rank : {1U, 2U}) {
    const Exchange exchange(needs, {{0, 0, 0}, {7, 8, 8}}, rank, need.files(), {1 << 20, 1 << 20}, network);
    REQUIRE(exchange.rounds() == 3);
    const std::vector<int64_t> sizes = exchange.bytes_to_send(2);
    if (sum(sizes) == 3 * exchange::kHeaderBytes) continue;
    ++relays;
    std::string memory(static_cast<size_t>(sum(sizes)), '?');
    RoundStats stats;
    CHECK_THROWS_AS(exchange.pack(2, data_of(memory), nullptr, layouts, options, never, stats), std::invalid_argument);
  }
  CHECK(relays > 0);
}

TEST_CASE("a read that fails is an error with path and record, also while another round is placed") {
  Random random(72);
  CheckpointFiles files(1);
  files.add_random(random, 0, 0, {300, 300}, true);
  files.write();
  RandomLoad load(random);
  const Options options;
  const Layouts layouts = files.layouts(options, io::IoMode::kCached);
  std::string memory(300 * 300 * 4, '#');
  transfer::Destination destination;
  destination.data = data_of(memory);
  destination.device = transfer::kHost;
  destination.sizes = {300, 300};
  destination.strides = {300, 1};
  destination.dtype = 0;
  Item item;
  item.lengths = {300, 300};
  item.storage_offsets = item.destination_offsets = {0, 0};
  const Program program(layouts, {item}, {destination});
  const LocalNeed local = exchange::need_of(program, 0, {"x"});
  const std::vector<int64_t> words = local.need.encode();
  std::vector<Need> needs;
  needs.push_back(Need::decode(words.data(), words.size()));
  const Exchange exchange(std::move(needs), {{0}, {0}}, 0, local.need.files(), {100000, 100000});
  REQUIRE(exchange.rounds() > 2);
  std::string sent(200000, '?');
  std::string received(200000, '?');
  io::FaultySystemCalls calls(fault(io::FaultFunction::kPread, 0, EIO));
  const ScopedCalls scope(calls);
  try {
    exchange::step(exchange, Send{1, data_of(sent)}, Receive{0, data_of(received)}, layouts, local, options, {}, never);
    FAIL("nothing was thrown");
  } catch (const Error& error) {
    CHECK(error.error_number == EIO);
    CHECK(error.path == files.paths[0]);
    CHECK(error.record == 0);
    CHECK(error.offset >= 0);
  }
}
