#include "transfer/workers.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <system_error>
#include <thread>

#include "trace/recorder.h"

namespace dcp_fast::transfer {

const io::ByteSource& Worker::open(io::ByteSource& source) {
  if (source_.get() != &source) {
    window.reset();
    source_ = {};  // first, so that no thread has two open
    source_ = io::OpenSource(source);
  }
  return source;
}

namespace {

constexpr std::chrono::milliseconds kPollInterval(100);

using Body = std::function<void(size_t, size_t, Worker&)>;

class Pool {
 public:
  Pool(const Groups& groups, io::IoCounters& counters, const Body& body)
      : groups_(groups), counters_(counters), body_(body), left_(groups.tasks) {
    size_t end = 0;
    for (const size_t tasks : groups.tasks) ends_.push_back(end += tasks);
  }

  ~Pool() {
    cancel();
    for (std::thread& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Returns how many threads there are. If the system is out of threads, fewer do the same work.
  int start(int threads) {
    threads_.reserve(static_cast<size_t>(threads));
    running_ = threads;
    for (int i = 0; i < threads; ++i) {
      try {
        threads_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        const std::scoped_lock lock(mutex_);
        running_ -= threads - i;
        return i;
      }
    }
    return threads;
  }

  void wait(const std::function<bool()>& interrupted) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      done_.wait_for(lock, kPollInterval, [this] { return running_ == 0 || is_next_group_done(); });
      if (is_next_group_done()) {
        lock.unlock();
        if (groups_.finish) groups_.finish(finished_);
        lock.lock();
        ++finished_;
        begin_.notify_all();
        continue;
      }
      if (running_ == 0) break;
      lock.unlock();
      const bool stop = interrupted();
      lock.lock();
      if (stop) throw Interrupted();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    try {
      const trace::ThreadScope scope(counters_.recorder);
      Worker worker;
      worker.counters = &counters_;
      worker.cancelled = [this] { return cancelled_.load(std::memory_order_relaxed); };
      for (size_t task = next_++; task < ends_.back() && !cancelled_; task = next_++) {
        const auto group = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin());
        if (!wait_for_turn(group)) break;
        body_(group, task - (ends_[group] - groups_.tasks[group]), worker);
        count(group);
      }
    } catch (...) {
      const std::scoped_lock lock(mutex_);
      if (!error_) error_ = std::current_exception();
      cancelled_ = true;
      begin_.notify_all();
    }
    const std::scoped_lock lock(mutex_);
    if (--running_ == 0) done_.notify_all();
  }

  // Waits until a group may begin. False if the work is cancelled.
  bool wait_for_turn(size_t group) {
    if (groups_.after[group] == 0) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    begin_.wait(lock, [&] { return finished_ >= groups_.after[group] || cancelled_; });
    return !cancelled_;
  }

  void count(size_t group) {
    const std::scoped_lock lock(mutex_);
    if (--left_[group] == 0) done_.notify_all();
  }

  bool is_next_group_done() const { return !error_ && finished_ < left_.size() && left_[finished_] == 0; }

  void cancel() {
    const std::scoped_lock lock(mutex_);
    cancelled_ = true;
    begin_.notify_all();
  }

  const Groups& groups_;
  std::vector<size_t> ends_;  // where each group ends among all tasks
  io::IoCounters& counters_;
  const Body& body_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable done_;   // a group or a thread is done
  std::condition_variable begin_;  // another group may begin
  std::vector<size_t> left_;       // how many tasks of each group are not done
  size_t finished_ = 0;            // how many groups are finished
  int running_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

void run_here(const Groups& groups, io::IoCounters& counters, const std::function<bool()>& interrupted,
              const Body& body) {
  Worker worker;
  worker.counters = &counters;
  auto asked = std::chrono::steady_clock::now();
  worker.cancelled = [&] {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked <= kPollInterval) return false;
    asked = now;
    return interrupted();
  };
  for (size_t group = 0; group < groups.tasks.size(); ++group) {
    for (size_t task = 0; task < groups.tasks[group]; ++task) {
      worker.stop_if_cancelled();
      body(group, task, worker);
    }
    if (groups.finish) groups.finish(group);
  }
}

}  // namespace

void run_parallel(const Groups& groups, int threads, io::IoCounters& counters, const std::function<bool()>& interrupted,
                  const Body& body) {
  size_t tasks = 0;
  for (const size_t of_group : groups.tasks) tasks += of_group;
  if (tasks > 1 && threads > 1) {  // else a thread of its own would only wait for another one
    Pool pool(groups, counters, body);
    if (pool.start(static_cast<int>(std::min<size_t>(tasks, static_cast<size_t>(threads)))) > 0) {
      return pool.wait(interrupted);
    }
  }
  run_here(groups, counters, interrupted, body);
}

void run_parallel(size_t tasks, int threads, io::IoCounters& counters, const std::function<bool()>& interrupted,
                  const std::function<void(size_t, Worker&)>& body) {
  run_parallel(Groups{{tasks}, {0}, {}}, threads, counters, interrupted,
               [&body](size_t, size_t task, Worker& worker) { body(task, worker); });
}

}  // namespace dcp_fast::transfer
