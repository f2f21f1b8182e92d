#include "driver/streams.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "driver/simulator.h"

namespace simcuda {

namespace {

Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace

Stream::Stream(Simulator& simulator, Context& context, StreamKind kind)
    : simulator_(simulator), context_(context), kind_(kind), agent_(simulator.races.add_agent()) {
  name_ = kind == StreamKind::kNull ? "the default stream" : "stream " + std::to_string(++simulator.streams_made);
  name_ += " of device " + std::to_string(context.device);
}

std::shared_ptr<const Work> Stream::order(std::string label) {
  clock_.join(simulator_.races.host_clock());
  if (kind_ == StreamKind::kNull) {
    for (const auto& other : context_.streams) {
      if (other->kind_ == StreamKind::kBlocking) order_after(*other);
    }
  } else if (kind_ == StreamKind::kBlocking && context_.null_stream != nullptr) {
    order_after(*context_.null_stream);
  }
  const uint64_t epoch = clock_.advance(agent_);
  return std::make_shared<Work>(Work{agent_, epoch, clock_, std::move(label) + " on " + name_});
}

void Stream::order_after(const Stream& other) {
  clock_.join(other.clock_);
  if (!other.idle()) order_after_.push_back(other.tail_);
}

void Stream::wait_for(const VectorClock& clock) { clock_.join(clock); }

void Stream::enqueue(Operation operation) {
  std::move(order_after_.begin(), order_after_.end(), std::back_inserter(operation.after));
  order_after_.clear();
  operation.ready = Clock::now();
  tail_ = operation.completion;
  queue_.push_back(std::move(operation));
  if (!started_) {
    started_ = true;
    std::thread([self = shared_from_this()] { self->serve(); }).detach();
  }
  arrived_.notify_one();
}

void Stream::close() {
  closed_ = true;
  arrived_.notify_one();
  if (!started_) retire();
}

void Stream::retire() {
  simulator_.races.retire_agent(agent_, clock_.at(agent_));
  auto& streams = context_.streams;
  streams.erase(std::remove(streams.begin(), streams.end(), shared_from_this()), streams.end());
}

void Stream::serve() {
  Lock lock(simulator_.mutex);
  while (true) {
    arrived_.wait(lock, [this] { return !queue_.empty() || closed_; });
    if (queue_.empty()) return retire();
    Operation operation = std::move(queue_.front());
    queue_.pop_front();
    // Work that is queued begins when what it waits for ends. That threads wake up late is no part of the model.
    operation.ready = std::max(operation.ready, free_at_);
    for (const auto& other : operation.after) {
      simulator_.progress.wait(lock, [&] { return other->done || simulator_.ending; });
      operation.ready = std::max(operation.ready, other->time);
    }
    if (simulator_.ending) return;
    running_ = true;
    operation.completion->time = operation.ready;
    execute(operation, lock);
    running_ = false;
    operation.completion->done = true;
    free_at_ = operation.completion->time;
    simulator_.progress.notify_all();
  }
}

void Stream::execute(Operation& operation, Lock& lock) {
  // After an error nothing is done any more, but everything ends.
  if (context_.sticky == CUDA_SUCCESS) {
    const CUresult result = operation.fault != CUDA_SUCCESS ? operation.fault : run(operation, lock);
    if (context_.sticky == CUDA_SUCCESS) context_.sticky = result;
  }
  if (operation.ended) operation.ended();
}

CUresult Stream::run(Operation& operation, Lock& lock) {
  if (!operation.run) return CUDA_SUCCESS;
  if (operation.link != nullptr) return run_on_link(operation, lock);
  lock.unlock();
  const CUresult result = operation.run();
  lock.lock();
  operation.completion->time = Clock::now();
  return result;
}

CUresult Stream::run_on_link(Operation& operation, Lock& lock) {
  Link& link = *operation.link;
  const Clock::time_point end = occupy(operation);
  const auto sleep_until = [&](Clock::time_point time) {
    simulator_.progress.wait_until(lock, time, [this] { return simulator_.ending; });
  };
  const auto bytes = static_cast<double>(operation.bytes);
  if (simulator_.settings.late) sleep_until(end - seconds(bytes * link.host_seconds_per_byte));
  if (simulator_.ending) return CUDA_SUCCESS;

  lock.unlock();
  const Clock::time_point start = Clock::now();
  const CUresult result = operation.run();
  const Clock::time_point copied = Clock::now();
  lock.lock();
  constexpr double kEnoughBytesToMeasure = 1 << 20;
  if (bytes >= kEnoughBytesToMeasure) link.host_seconds_per_byte = seconds_between(start, copied) / bytes;
  sleep_until(end);
  operation.completion->time = std::max(end, copied);  // the host may be slower than the model
  return result;
}

// Books the link for the copy and returns when it ends.
Clock::time_point Stream::occupy(const Operation& operation) {
  const Settings& settings = simulator_.settings;
  double duration = settings.latency_seconds;
  if (settings.copy_gbps > 0) duration += static_cast<double>(operation.bytes) / (settings.copy_gbps * 1e9);
  if (settings.jitter_seconds > 0) {
    duration += std::uniform_real_distribution<double>(0, settings.jitter_seconds)(simulator_.random);
  }
  context_.copy_seconds += duration;
  Link& link = *operation.link;
  link.free_at = std::max(operation.ready, link.free_at) + seconds(duration);
  return link.free_at;
}

}  // namespace simcuda
