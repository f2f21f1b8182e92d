#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "error.h"
#include "exchange/exchange.h"
#include "trace/recorder.h"

namespace dcp_fast::exchange {

namespace {

constexpr std::chrono::milliseconds kPollInterval(100);

// Work on a thread of its own, which is asked to stop and waited for when the object goes.
class Aside {
 public:
  // Throws std::system_error if there is no thread.
  explicit Aside(const std::function<void(const std::function<bool()>&)>& work)
      : thread_([this, work] { run(work); }) {}
  ~Aside() {
    stop_ = true;
    thread_.join();
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;

  // Throws what the work threw, and Interrupted.
  void wait(const std::function<bool()>& interrupted) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!ended_.wait_for(lock, kPollInterval, [this] { return has_ended_; })) {
      lock.unlock();
      const bool stop = interrupted();
      lock.lock();
      if (stop) throw Interrupted();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void run(const std::function<void(const std::function<bool()>&)>& work) {
    std::exception_ptr error;
    try {
      work([this] { return stop_.load(); });
    } catch (...) {
      error = std::current_exception();
    }
    const std::scoped_lock lock(mutex_);
    error_ = error;
    has_ended_ = true;
    ended_.notify_all();
  }

  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable ended_;
  bool has_ended_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace

RoundStats step(const Exchange& exchange, std::optional<Send> send, std::optional<Receive> receive,
                const transfer::Layouts& layouts, const LocalNeed& local, const transfer::Options& options,
                const transfer::CudaTargets& cuda, const std::function<bool()>& interrupted) {
  RoundStats stats;
  const auto pack = [&](const std::function<bool()>& stops) {
    const bool can_pass_on = receive && receive->round + kRelayRounds == send->round;
    exchange.pack(send->round, send->memory, can_pass_on ? receive->memory : nullptr, layouts, options, stops, stats);
  };
  const auto place = [&] {
    // On a track of its own, beside reads and the exchange.
    trace::Recorder* const recorder = options.recorder.get();
    const int64_t began = recorder != nullptr ? recorder->now() : 0;
    stats.placed = exchange.place(receive->round, receive->memory, layouts, local, options, cuda, interrupted);
    if (recorder != nullptr) {
      recorder->add(recorder->track("placement"), "place", began, recorder->now(), {stats.placed.bytes_placed});
    }
  };
  std::optional<Aside> packing;
  if (send && receive) {
    try {
      packing.emplace(pack);
    } catch (const std::system_error&) {
      packing.reset();  // the system has no thread to give
    }
  }
  if (receive) place();
  if (packing) {
    packing->wait(interrupted);
  } else if (send) {
    pack(interrupted);
  }
  return stats;
}

}  // namespace dcp_fast::exchange
