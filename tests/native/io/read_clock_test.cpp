#include "io/read_clock.h"

#include <cerrno>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "faults.h"
#include "io/file.h"
#include "io/file_reading.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::FaultFunction;
using io::ReadClock;

namespace {

ReadClock::Time at(int nanoseconds) { return ReadClock::Time(std::chrono::nanoseconds(nanoseconds)); }
std::chrono::nanoseconds ns(int count) { return std::chrono::nanoseconds(count); }

}  // namespace

TEST_CASE("requests that overlap count once as reading and each as waiting") {
  ReadClock clock;
  CHECK(clock.reading() == ns(0));
  clock.enter(at(10));
  clock.enter(at(15));
  clock.leave(at(10), at(20));
  CHECK(clock.reading() == ns(0));  // one is still under way
  clock.leave(at(15), at(30));
  CHECK(clock.reading() == ns(20));
  clock.enter(at(100));
  clock.leave(at(100), at(101));
  CHECK(clock.reading() == ns(21));
  CHECK(clock.waiting() == ns(10 + 15 + 1));
}

TEST_CASE("times that arrive out of order are not counted twice") {
  ReadClock clock;
  clock.enter(at(10));
  clock.leave(at(10), at(20));
  clock.enter(at(18));  // read before the other thread left
  clock.leave(at(18), at(25));
  CHECK(clock.reading() == ns(15));
  clock.enter(at(21));
  clock.leave(at(21), at(23));
  CHECK(clock.reading() == ns(15));
  CHECK(clock.waiting() == ns(10 + 7 + 2));
}

TEST_CASE("reading is never longer than the wall clock, and for one thread as long as its waiting") {
  ReadClock alone;
  for (int i = 0; i < 1000; ++i) {
    const auto now = trace::Clock::now();
    alone.enter(now);
    alone.leave(now, trace::Clock::now());
  }
  CHECK(alone.reading() == alone.waiting());
  ReadClock clock;
  const auto begin = trace::Clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&clock] {
      for (int j = 0; j < 5000; ++j) {
        const auto now = trace::Clock::now();
        clock.enter(now);
        clock.leave(now, trace::Clock::now());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(clock.reading() > ns(0));
  // More than their waiting it may be: a thread that is kept from saying that its request is over counts as reading.
  CHECK(clock.reading() <= trace::Clock::now() - begin);
}

TEST_CASE("every request of a file is timed and leaves a span, failed ones too") {
  const TempDir dir;
  for (const io::IoMode mode : {io::IoMode::kCached, io::IoMode::kDirect}) {
    const OpenFile file(dir.write("file", std::string(100000, 'x')), mode);
    ReadClock clock;
    trace::Recorder recorder;
    io::IoCounters counters;
    counters.clock = &clock;
    counters.recorder = &recorder;
    io::AlignedBuffer buffer;
    std::string bytes(300, '?');
    {
      io::FaultySystemCalls calls(fault(FaultFunction::kPread, 0, 0, 3, 100));  // three short reads
      const ScopedCalls scope(calls);
      file.read_exactly(bytes.data(), 300, 1000, counters);
    }
    std::vector<iovec> vectors{{bytes.data(), 100}, {bytes.data() + 200, 100}};
    file.read_scattered(vectors, 5000, counters);
    file.view(buffer, 50000, 7, counters);
    {
      io::FaultySystemCalls calls(fault(FaultFunction::kPread, 0, EIO, 9));
      const ScopedCalls scope(calls);
      CHECK(error_of([&] { file.view(buffer, 10, 99990, counters); }).has_value());
    }
    const std::vector<trace::Event> events = recorder.events();
    REQUIRE(events.size() == 6);
    CHECK(static_cast<int64_t>(events.size()) == counters.requests);
    int64_t total = 0;
    ReadClock::Duration summed{0};
    for (const trace::Event& event : events) {
      CHECK(event.name == std::string("read"));
      CHECK(*event.arguments.path == file.path());
      CHECK(recorder.tracks()[event.track] == "reader 1");
      total += event.arguments.bytes;
      summed += ns(static_cast<int>(event.end - event.begin));
    }
    CHECK(total == counters.bytes);
    CHECK(events[0].arguments.offset == 1000);
    CHECK(events[2].arguments.offset == 1200);
    CHECK(events[3].arguments.bytes == 200);
    CHECK(events[5].arguments.bytes == 0);
    CHECK(clock.reading() == clock.waiting());  // one thread
    CHECK(clock.waiting() >= summed);
  }
}
