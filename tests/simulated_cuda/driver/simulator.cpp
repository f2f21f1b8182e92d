#include "driver/simulator.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace simcuda {

namespace {

// The lock is held over a fork, so that the child finds everything whole; the threads of streams are gone there.
void before_fork() { simulator().mutex.lock(); }
void after_fork_in_parent() { simulator().mutex.unlock(); }
void after_fork_in_child() {
  simulator().forked = simulator().initialized;
  simulator().mutex.unlock();
}

// Ends work before the destructors of the program free what it touches. Queued work is not done any more.
void at_exit() {
  Simulator& state = simulator();
  if (state.forked) return;
  Lock lock(state.mutex);
  state.ending = true;
  state.progress.notify_all();
  const auto silent = [&] {
    return std::all_of(state.contexts.begin(), state.contexts.end(), [](const auto& context) {
      return std::none_of(context->streams.begin(), context->streams.end(),
                          [](const auto& stream) { return stream->running(); });
    });
  };
  constexpr std::chrono::seconds kPatience(5);
  state.progress.wait_for(lock, kPatience, silent);
}

}  // namespace

Simulator& simulator() {
  static auto& instance = *new Simulator();  // NOLINT(cppcoreguidelines-owning-memory)
  return instance;
}

Simulator::Simulator() : settings(Settings::from_environment()), random(settings.seed) {
  races.enable(settings.races);
  const char* planned = std::getenv("SIMCUDA_FAULT");  // NOLINT(concurrency-mt-unsafe): nobody sets it here
  if (planned == nullptr) return;
  try {
    faults.plan(planned);
  } catch (const std::exception& error) {
    // A test that believes in its faults must not pass without them.
    std::fprintf(stderr, "simcuda: %s\n", error.what());
    std::abort();
  }
}

void Simulator::initialize() {
  if (forked) throw DriverError{CUDA_ERROR_NOT_INITIALIZED};
  if (initialized) return;
  ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
  std::atexit(at_exit);
  for (int device = 0; device < settings.devices; ++device) contexts.push_back(std::make_unique<Context>(device));
  initialized = true;
}

Context& Simulator::context_of(int device) {
  if (device < 0 || device >= static_cast<int>(contexts.size())) throw DriverError{CUDA_ERROR_INVALID_DEVICE};
  return *contexts[static_cast<size_t>(device)];
}

Context* Simulator::owner_of(uint64_t address) {
  const auto found = std::find_if(contexts.begin(), contexts.end(),
                                  [&](const auto& context) { return context->memory.owns(address); });
  return found == contexts.end() ? nullptr : found->get();
}

void Simulator::wait(Lock& lock, std::shared_ptr<const Completion> completion) {
  if (completion == nullptr) return;
  progress.wait(lock, [&] { return completion->done || ending; });
  if (!completion->done) throw DriverError{CUDA_ERROR_DEINITIALIZED};
}

void Simulator::drain(Lock& lock, const Context* context) {
  Completions tails;
  for (const auto& each : contexts) {
    if (context != nullptr && each.get() != context) continue;
    for (const auto& stream : each->streams) tails.push_back(stream->tail());
  }
  for (const auto& tail : tails) wait(lock, tail);
}

void Simulator::learn_of_failure(Lock& lock, const Context& context) {
  progress.wait(lock, [&] {
    return ending || std::none_of(context.streams.begin(), context.streams.end(),
                                  [](const auto& stream) { return stream->running(); });
  });
  for (const auto& stream : context.streams) races.host_waited_for(stream->clock());
}

void Simulator::clear(Lock& lock, Context& context) {
  drain(lock, &context);
  const auto is_here = [&](const auto& object) { return &object.context == &context; };
  size_t objects = context.memory.allocations().size() + events.remove_if(is_here) + modules.remove_if(is_here);
  functions.remove_if(is_here);
  objects += streams.remove_if([&](Stream& stream) {
    if (&stream.context() != &context) return false;
    stream.close();
    return true;
  });
  if (context.null_stream != nullptr) context.null_stream->close();
  context.null_stream.reset();
  context.memory.free_all();
  std::vector<const HostRange*> ranges;
  for (const auto& [begin, range] : host.ranges()) {
    if (range.context == &context) ranges.push_back(&range);
  }
  for (const HostRange* range : ranges) host.remove(*range);
  objects += ranges.size();
  context.sticky = CUDA_SUCCESS;
  if (objects > 0) {
    reports.add("LEAK: the context of device " + std::to_string(context.device) + " was released with " +
                std::to_string(objects) + " objects left in it");
  }
}

}  // namespace simcuda
