// Streams: queues of work, each with a thread of its own that executes it in order, once other work that it waits for
// is done. How long copies take is modelled here.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver/driver_error.h"
#include "driver/races.h"

namespace simcuda {

struct Context;
struct Link;
struct Simulator;

using Clock = std::chrono::steady_clock;

// Whether, and when, a piece of work was done: by the model, where that says how long it takes.
struct Completion {
  bool done = false;
  Clock::time_point time;
};

using Completions = std::vector<std::shared_ptr<Completion>>;

struct Operation {
  // Called without the simulator's lock; empty for work that only marks a place in the queue.
  std::function<CUresult()> run;
  // Called with the lock when the work is over, also where it was not done because of an earlier error.
  std::function<void()> ended;
  Completions after;              // of other streams
  Link* link = nullptr;           // what a copy between host and device occupies
  size_t bytes = 0;               // that go over the link
  CUresult fault = CUDA_SUCCESS;  // what it fails with instead of being done
  Clock::time_point ready;        // when it could begin
  std::shared_ptr<Completion> completion = std::make_shared<Completion>();
};

enum class StreamKind { kNull, kBlocking, kNonBlocking };

// All members are guarded by the simulator's lock.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  Stream(Simulator& simulator, Context& context, StreamKind kind);
  ~Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Context& context() const { return context_; }
  StreamKind kind() const { return kind_; }
  const std::string& name() const { return name_; }
  const VectorClock& clock() const { return clock_; }
  // Of the last work; null if there never was any.
  const std::shared_ptr<Completion>& tail() const { return tail_; }
  bool idle() const { return tail_ == nullptr || tail_->done; }
  // Whether work is being executed at this moment.
  bool running() const { return running_; }

  // Orders new work after all that it must come after. What enqueue is given next is this work.
  std::shared_ptr<const Work> order(std::string label);
  // Makes what comes next wait for an event.
  void wait_for(const VectorClock& clock);
  void enqueue(Operation operation);
  // Work that is queued is still done.
  void close();

 private:
  void order_after(const Stream& other);
  void retire();
  void serve();
  void execute(Operation& operation, std::unique_lock<std::mutex>& lock);
  // Does the work, and sets when it was done.
  CUresult run(Operation& operation, std::unique_lock<std::mutex>& lock);
  CUresult run_on_link(Operation& operation, std::unique_lock<std::mutex>& lock);
  Clock::time_point occupy(const Operation& operation);

  Simulator& simulator_;
  Context& context_;
  StreamKind kind_;
  Agent agent_;
  std::string name_;
  VectorClock clock_;
  Completions order_after_;  // of null stream and blocking streams, for the work that is enqueued next
  std::deque<Operation> queue_;
  std::condition_variable arrived_;
  std::shared_ptr<Completion> tail_;
  Clock::time_point free_at_;  // when its last work was done
  bool started_ = false;
  bool running_ = false;
  bool closed_ = false;
};

}  // namespace simcuda
