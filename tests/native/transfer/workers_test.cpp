#include "transfer/workers.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "io/file.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::FaultySystemCalls;
using transfer::Groups;
using transfer::run_parallel;
using transfer::Worker;

namespace {

bool never() { return false; }
void nap(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

// As long as it lives, threads ask for stacks larger than the address space: none can be started.
class NoThreads {
 public:
  NoThreads() {
    pthread_getattr_default_np(&before_);
    pthread_attr_t attributes;
    pthread_getattr_default_np(&attributes);
    works =
        pthread_attr_setstacksize(&attributes, size_t{1} << 48) == 0 && pthread_setattr_default_np(&attributes) == 0;
  }
  ~NoThreads() { pthread_setattr_default_np(&before_); }
  NoThreads(const NoThreads&) = delete;
  NoThreads& operator=(const NoThreads&) = delete;

  bool works = false;

 private:
  pthread_attr_t before_{};
};

}  // namespace

TEST_CASE("every task runs exactly once, on no more threads than asked") {
  for (const size_t tasks : {size_t{0}, size_t{1}, size_t{2}, size_t{7}, size_t{1000}}) {
    for (const int threads : {1, 2, 5, 64}) {
      std::vector<std::atomic<int>> runs(tasks);
      std::mutex mutex;
      std::set<std::thread::id> ids;
      std::atomic<int> at_once{0};
      std::atomic<int> most{0};
      io::IoCounters counters;
      run_parallel(tasks, threads, counters, never, [&](size_t task, Worker& worker) {
        const int now = ++at_once;
        for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
        }
        ++runs[task];
        worker.counters->requests += 1;
        {
          const std::lock_guard<std::mutex> lock(mutex);
          ids.insert(std::this_thread::get_id());
        }
        --at_once;
      });
      for (const auto& count : runs) REQUIRE(count == 1);
      REQUIRE(counters.requests == static_cast<int64_t>(tasks));
      REQUIRE(ids.size() <= static_cast<size_t>(threads));
      REQUIRE(most <= threads);
    }
  }
}

TEST_CASE("one thread takes tasks in ascending order") {
  io::IoCounters counters;
  std::vector<size_t> order;
  run_parallel(100, 1, counters, never, [&](size_t task, Worker&) { order.push_back(task); });
  for (size_t i = 0; i < order.size(); ++i) REQUIRE(order[i] == i);
  CHECK(order.size() == 100);
}

TEST_CASE("groups are finished in order on the calling thread, and not too many are begun at once") {
  for (const int threads : {1, 2, 5, 32}) {
    for (const size_t at_once : {size_t{1}, size_t{2}, size_t{100}}) {
      Groups groups;
      groups.tasks = {7, 0, 1, 30, 0, 0, 5, 11, 0};
      for (size_t group = 0; group < groups.tasks.size(); ++group) {
        groups.after.push_back(group < at_once ? 0 : group + 1 - at_once);
      }
      std::vector<std::atomic<int>> done(groups.tasks.size());
      std::atomic<size_t> finished{0};
      std::atomic<bool> in_time{true};
      const std::thread::id here = std::this_thread::get_id();
      groups.finish = [&](size_t group) {
        if (group != finished || std::this_thread::get_id() != here) in_time = false;
        if (done[group] != static_cast<int>(groups.tasks[group])) in_time = false;
        nap(1);
        ++finished;
      };
      io::IoCounters counters;
      run_parallel(groups, threads, counters, never, [&](size_t group, size_t task, Worker&) {
        if (group >= finished + at_once || task >= groups.tasks[group]) in_time = false;
        ++done[group];
      });
      CHECK(in_time);
      CHECK(finished == groups.tasks.size());
      for (size_t group = 0; group < done.size(); ++group) {
        CHECK(done[group] == static_cast<int>(groups.tasks[group]));
      }
    }
  }
}

TEST_CASE("what fails or interrupts groups ends threads that wait for their turn") {
  Groups groups;
  groups.tasks = {8, 8, 8};
  groups.after = {0, 1, 2};
  io::IoCounters counters;
  const auto nothing = [](size_t, size_t, Worker&) {};
  groups.finish = [](size_t group) {
    if (group == 1) throw Error(ErrorKind::kCuda, "broken");
  };
  CHECK_THROWS_AS(run_parallel(groups, 4, counters, never, nothing), Error);
  CHECK_THROWS_AS(run_parallel(groups, 1, counters, never, nothing), Error);
  groups.finish = {};
  const auto broken = [](size_t group, size_t, Worker&) {
    if (group == 0) nap(5);
    if (group == 0) throw Error(ErrorKind::kIo, "broken");
  };
  CHECK_THROWS_AS(run_parallel(groups, 4, counters, never, broken), Error);
  const auto slow = [](size_t, size_t, const Worker& worker) {
    for (int i = 0; i < 100 && !worker.cancelled(); ++i) nap(5);
  };
  CHECK_THROWS_AS(run_parallel(groups, 4, counters, [] { return true; }, slow), Interrupted);
}

TEST_CASE("the first exception cancels what has not started and is thrown as it was") {
  for (const int threads : {1, 4}) {
    for (const size_t failing : {size_t{0}, size_t{5}, size_t{99}}) {
      io::IoCounters counters;
      std::atomic<int> runs{0};
      try {
        run_parallel(100, threads, counters, never, [&](size_t task, const Worker& worker) {
          ++runs;
          if (task == failing) {
            Error error(ErrorKind::kIo, "broken");
            error.error_number = static_cast<int>(task);
            throw error;
          }
          while (task > failing && !worker.cancelled()) nap(1);
        });
        FAIL("no error");
      } catch (const Error& error) {
        CHECK(error.error_number == static_cast<int>(failing));
      }
      CHECK(runs >= static_cast<int>(failing) + 1);
      CHECK(runs <= static_cast<int>(failing) + threads);
    }
  }
  io::IoCounters counters;
  const auto body = [](size_t, Worker&) { throw std::bad_alloc(); };
  CHECK_THROWS_AS(run_parallel(1, 4, counters, never, body), std::bad_alloc);
  CHECK_THROWS_AS(run_parallel(50, 4, counters, never, body), std::bad_alloc);
}

TEST_CASE("of several exceptions the first one counts") {
  io::IoCounters counters;
  const auto body = [](size_t task, const Worker& worker) {
    while (task > 0 && !worker.cancelled()) nap(1);
    throw std::runtime_error(std::to_string(task));
  };
  CHECK_THROWS_WITH_AS(run_parallel(2, 2, counters, never, body), "0", std::runtime_error);
}

TEST_CASE("an interruption cancels what has not started") {
  io::IoCounters counters;
  std::atomic<int> runs{0};
  CHECK_THROWS_AS(run_parallel(
                      10000, 2, counters, [] { return true; },
                      [&](size_t, Worker&) {
                        ++runs;
                        nap(10);
                      }),
                  Interrupted);
  CHECK(runs < 10000);  // all of them take 50 s
  const int after = runs;
  nap(50);
  CHECK(runs == after);  // nothing is left behind
}

TEST_CASE("interrupted is asked on the calling thread") {
  io::IoCounters counters;
  const auto caller = std::this_thread::get_id();
  int asked = 0;
  run_parallel(
      8, 2, counters,
      [&] {
        ++asked;
        CHECK(std::this_thread::get_id() == caller);
        return false;
      },
      [&](size_t, Worker&) { nap(70); });
  CHECK(asked >= 1);
  CHECK(asked <= 1000);  // ten times a second
}

TEST_CASE("a task that asks is cancelled, by an interruption and by another task's error") {
  const auto work_on = [](size_t, const Worker& worker) {
    for (;;) {
      worker.stop_if_cancelled();
      nap(1);
    }
  };
  for (const int threads : {1, 3}) {
    io::IoCounters counters;
    CHECK_THROWS_AS(run_parallel(3, threads, counters, [] { return true; }, work_on), Interrupted);
  }
  io::IoCounters counters;
  const auto one_fails = [&](size_t task, const Worker& worker) {
    if (task == 2) throw std::runtime_error("broken");
    work_on(task, worker);
  };
  CHECK_THROWS_WITH_AS(run_parallel(3, 3, counters, never, one_fails), "broken", std::runtime_error);
}

TEST_CASE("without any threads to be had the calling one does the work") {
  io::IoCounters counters;
  std::set<std::thread::id> ids;
  const auto body = [&ids](size_t, const Worker&) { ids.insert(std::this_thread::get_id()); };
  {
    const NoThreads none;
    REQUIRE(none.works);
    CHECK_THROWS_AS(std::thread([] {}).join(), std::system_error);
    run_parallel(10, 4, counters, never, body);
    CHECK(ids == std::set<std::thread::id>{std::this_thread::get_id()});
  }
  std::thread([] {}).join();
}

TEST_CASE("an exception of interrupted itself gets through") {
  io::IoCounters counters;
  const auto interrupted = []() -> bool { throw std::runtime_error("signal"); };
  CHECK_THROWS_AS(run_parallel(1000, 2, counters, interrupted, [](size_t, Worker&) { nap(5); }), std::runtime_error);
}

TEST_CASE("workers share a file while they read it and close it when all have moved on") {
  const TempDir dir;
  const std::vector<std::string> paths = {dir.write("a", "aaaa"), dir.write("b", "bb"), dir.path("missing")};
  io::ByteSources files;
  for (const std::string& path : paths) files.push_back(std::make_unique<io::File>(path));
  FaultySystemCalls opens(fault(io::FaultFunction::kOpen, -1, 0));
  FaultySystemCalls closes(fault(io::FaultFunction::kClose, -1, 0));
  {
    const ScopedCalls scope(opens);
    Worker one;
    Worker two;
    CHECK(&one.open(*files[0]) == &two.open(*files[0]));
    CHECK(&one.open(*files[0]) == &one.open(*files[0]));
    CHECK(opens.calls() == 1);
    CHECK(one.open(*files[1]).size() == 2);
    CHECK(two.open(*files[0]).size() == 4);
    CHECK(opens.calls() == 2);
    CHECK_THROWS_AS(one.open(*files[2]), Error);
    CHECK_THROWS_AS(one.open(*files[2]), Error);  // not remembered as open
    CHECK(one.open(*files[1]).path() == paths[1]);
  }
  const ScopedCalls scope(closes);
  Worker worker;
  for (int i = 0; i < 5; ++i) {
    worker.open(*files[0]);
    worker.open(*files[1]);
  }
  CHECK(closes.calls() == 9);
}
