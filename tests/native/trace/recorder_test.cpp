#include "trace/recorder.h"

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "checkpoint_files.h"
#include "doctest/doctest.h"
#include "random.h"
#include "transfer/engine.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using trace::Event;
using trace::Recorder;
using trace::Span;
using trace::ThreadScope;

TEST_CASE("nothing is recorded where nobody asks for it") {
  Span span(nullptr, "read");
  span.add_bytes(7);
  const ThreadScope scope(nullptr);
  const Recorder recorder;
  CHECK(recorder.events().empty());
  CHECK(recorder.tracks().empty());
}

TEST_CASE("spans keep their times, sizes and places") {
  Recorder recorder;
  const int64_t before = recorder.now();
  {
    Span outer(&recorder, "outer");
    Span inner(&recorder, "inner");
    inner.add_bytes(3);
    inner.add_bytes(4);
  }
  {
    const std::string path = "a file";  // gone before anybody looks
    trace::Arguments arguments;
    arguments.path = &path;
    arguments.offset = 12;
    recorder.add(recorder.track("cuda:0 copies"), recorder.keep(std::string("copy")), 5, 9, arguments);
  }
  const std::vector<Event> events = recorder.events();
  REQUIRE(events.size() == 3);
  CHECK(events[0].name == std::string("inner"));
  CHECK(events[0].arguments.bytes == 7);
  CHECK(events[0].arguments.path == nullptr);
  CHECK(events[1].name == std::string("outer"));
  CHECK(events[1].arguments.bytes == trace::kNone);
  CHECK(before <= events[1].begin);
  CHECK(events[1].begin <= events[0].begin);
  CHECK(events[0].begin <= events[0].end);
  CHECK(events[0].end <= events[1].end);
  CHECK(events[1].end <= recorder.now());
  CHECK(events[2].name == std::string("copy"));
  CHECK(events[2].begin == 5);
  CHECK(events[2].end == 9);
  CHECK(*events[2].arguments.path == "a file");
  CHECK(events[2].arguments.offset == 12);
  CHECK((recorder.tracks() == std::vector<std::string>{"reader 1", "cuda:0 copies"}));
  CHECK(recorder.track("cuda:0 copies") == events[2].track);
}

TEST_CASE("threads that record at the same time have tracks of their own") {
  Recorder recorder;
  constexpr int kThreads = 4;
  std::atomic<int> ready{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      const ThreadScope scope(&recorder);
      ++ready;
      while (ready < kThreads) std::this_thread::yield();
      for (int j = 0; j < 500; ++j) {
        const std::string path = std::to_string(j % 7);
        recorder.add_here("read", j, j + 1, {1, j, &path});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::map<trace::Track, int> counts;
  for (const Event& event : recorder.events()) ++counts[event.track];
  CHECK(counts.size() == kThreads);
  for (const auto& [track, count] : counts) CHECK(count == 500);
  CHECK((recorder.tracks() == std::vector<std::string>{"reader 1", "reader 2", "reader 3", "reader 4"}));
}

TEST_CASE("a thread that comes later takes over the track of one that ended") {
  Recorder recorder;
  recorder.track("load");
  for (int i = 0; i < 3; ++i) {
    std::thread([&] {
      const ThreadScope scope(&recorder);
      recorder.add_here("read", 0, 1);
    }).join();
  }
  recorder.add_here("read", 2, 3);  // this thread has no scope, and keeps what it got
  std::thread([&] {
    const ThreadScope scope(&recorder);
    recorder.add_here("read", 4, 5);
  }).join();
  CHECK((recorder.tracks() == std::vector<std::string>{"load", "reader 1", "reader 2"}));
  const std::vector<Event> events = recorder.events();
  REQUIRE(events.size() == 5);
  for (size_t i = 0; i < 4; ++i) CHECK(events[i].track == 1);
  CHECK(events[4].track == 2);
}

// Of a whole load by several threads: no two spans of a track overlap, and all that was read is there.
TEST_CASE("a load leaves its reads and slices, thread by thread") {
  Random random(7);
  CheckpointFiles files(1);
  files.add_random(random, 0, 0, {2000, 100}, true);
  files.write();
  std::string memory(2000 * 8 * 4, '#');
  transfer::Destination destination;
  destination.data = reinterpret_cast<std::byte*>(memory.data());
  destination.device = transfer::kHost;
  destination.sizes = {2000, 8};
  destination.strides = {8, 1};
  destination.dtype = 0;
  transfer::Item item;  // runs of 32 bytes, which pass through a bounce buffer
  item.lengths = {2000, 8};
  item.storage_offsets = {0, 16};
  item.destination_offsets = {0, 0};
  transfer::Options options;
  options.threads = 3;
  options.block_bytes = 1;
  options.read_clock = std::make_shared<io::ReadClock>();
  options.recorder = std::make_shared<Recorder>();
  const transfer::Layouts layouts = files.layouts(options, io::IoMode::kCached);
  const transfer::Program program(layouts, {item}, {destination});
  const transfer::Stats stats = transfer::run_wave(program, 0, options, {}, never);

  int64_t requests = 0;
  int64_t bytes = 0;
  int64_t sliced = 0;
  std::map<trace::Track, int64_t> ends;
  for (const Event& event : options.recorder->events()) {  // each thread adds its own in order
    CHECK(event.begin >= ends[event.track]);
    ends[event.track] = event.end;
    if (event.name == std::string("read")) {
      ++requests;
      bytes += event.arguments.bytes;
    } else {
      CHECK(event.name == std::string("slice"));
      sliced += event.arguments.bytes;
    }
  }
  CHECK(requests == layouts.requests + stats.requests);
  CHECK(bytes == layouts.bytes + stats.bytes_read);
  CHECK(sliced == stats.bytes_placed);
  CHECK(sliced == 2000 * 8 * 4);
  CHECK(ends.size() <= 4);  // three threads and this one
  CHECK(options.read_clock->reading() > io::ReadClock::Duration(0));
}
