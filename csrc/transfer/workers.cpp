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

Files::Files(const std::vector<std::string>& paths, const std::vector<io::IoMode>& modes)
    : paths_(paths), modes_(modes), slots_(paths.size()) {}

std::shared_ptr<io::File> Files::open(size_t file) {
  Slot& slot = slots_[file];
  const std::scoped_lock lock(slot.mutex);
  std::shared_ptr<io::File> opened = slot.file.lock();
  if (!opened) {
    opened = std::make_shared<io::File>(paths_[file]);
    opened->choose_mode(modes_[file], 0, 0);
    slot.file = opened;
  }
  return opened;
}

io::File& Worker::open(Files& files, size_t index) {
  if (file_index_ != index || !file_) {
    file_.reset();
    file_ = files.open(index);
    file_index_ = index;
  }
  return *file_;
}

namespace {

constexpr std::chrono::milliseconds kPollInterval(100);

class Pool {
 public:
  Pool(size_t tasks, io::IoCounters& counters, const std::function<void(size_t, Worker&)>& body)
      : tasks_(tasks), counters_(counters), body_(body) {}

  ~Pool() {
    cancelled_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Returns how many threads there are: where the system is out of them, fewer do the same work.
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
    while (!done_.wait_for(lock, kPollInterval, [this] { return running_ == 0; })) {
      lock.unlock();
      const bool stop = interrupted();
      lock.lock();
      if (stop) {
        cancelled_ = true;
        throw Interrupted();
      }
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
      for (size_t task = next_++; task < tasks_ && !cancelled_; task = next_++) body_(task, worker);
    } catch (...) {
      const std::scoped_lock lock(mutex_);
      if (!error_) error_ = std::current_exception();
      cancelled_ = true;
    }
    const std::scoped_lock lock(mutex_);
    if (--running_ == 0) done_.notify_all();
  }

  const size_t tasks_;
  io::IoCounters& counters_;
  const std::function<void(size_t, Worker&)>& body_;
  std::atomic<size_t> next_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable done_;
  int running_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

void run_here(size_t tasks, io::IoCounters& counters, const std::function<bool()>& interrupted,
              const std::function<void(size_t, Worker&)>& body) {
  Worker worker;
  worker.counters = &counters;
  auto asked = std::chrono::steady_clock::now();
  worker.cancelled = [&] {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked <= kPollInterval) return false;
    asked = now;
    return interrupted();
  };
  for (size_t task = 0; task < tasks; ++task) {
    worker.stop_if_cancelled();
    body(task, worker);
  }
}

}  // namespace

void run_parallel(size_t tasks, int threads, io::IoCounters& counters, const std::function<bool()>& interrupted,
                  const std::function<void(size_t, Worker&)>& body) {
  if (tasks == 0) return;
  if (tasks > 1 && threads > 1) {  // else a thread of its own would only wait for another one
    Pool pool(tasks, counters, body);
    if (pool.start(static_cast<int>(std::min<size_t>(tasks, static_cast<size_t>(threads)))) > 0) {
      return pool.wait(interrupted);
    }
  }
  run_here(tasks, counters, interrupted, body);
}

}  // namespace dcp_fast::transfer
