#include "driver/call.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

namespace simcuda {

Context*& current_context() {
  static thread_local Context* context = nullptr;
  return context;
}

CUcontext handle_of(Context* context) { return reinterpret_cast<CUcontext>(context); }

Context* context_of(const Simulator& simulator, CUcontext handle) {
  const auto found = std::find_if(simulator.contexts.begin(), simulator.contexts.end(), [&](const auto& context) {
    return handle_of(context.get()) == handle && context->references > 0;
  });
  if (found == simulator.contexts.end()) throw DriverError{CUDA_ERROR_INVALID_CONTEXT};
  return found->get();
}

Call::Call(Simulator& sim, Lock& held, const char* function) : simulator(sim), lock(held), function_(function) {
  const Fault fault = simulator.faults.next_call(function);
  number_ = simulator.faults.calls(function);
  (fault.time == FaultTime::kCall ? planned_error_ : asynchronous_) = fault.error;
}

std::string Call::label(const std::string& more) const {
  std::string text = function_ + (" #" + std::to_string(number_));
  if (!more.empty()) text += " (" + more + ")";
  return text;
}

void Call::complain(CUresult result, const std::string& why) {
  simulator.reports.add("CONTEXT: " + label() + " " + why);
  throw DriverError{result};
}

void Call::check(Needs needs) {
  if (simulator.ending) throw DriverError{CUDA_ERROR_DEINITIALIZED};
  if (needs == Needs::kNothing) return;
  if (!simulator.initialized || simulator.forked) throw DriverError{CUDA_ERROR_NOT_INITIALIZED};
  if (needs != Needs::kContext) return;
  const Context* context = current_context();
  if (context == nullptr) complain(CUDA_ERROR_INVALID_CONTEXT, "comes from a thread without a current context");
  if (context->references == 0) complain(CUDA_ERROR_CONTEXT_IS_DESTROYED, "uses a context that was released");
  if (context->sticky == CUDA_SUCCESS) return;
  if (planned_error_ == CUDA_SUCCESS) planned_error_ = context->sticky;
  simulator.learn_of_failure(lock, *context);
}

std::shared_ptr<Stream> Call::stream(CUstream handle) {
  if (handle != nullptr && handle != CU_STREAM_LEGACY) return simulator.streams.get(handle);
  std::shared_ptr<Stream>& stream = context().null_stream;
  if (stream == nullptr) {
    stream = std::make_shared<Stream>(simulator, context(), StreamKind::kNull);
    context().streams.push_back(stream);
  }
  return stream;
}

void Call::enqueue(Stream& stream, Operation operation) {
  operation.fault = std::exchange(asynchronous_, CUDA_SUCCESS);
  stream.enqueue(std::move(operation));
}

void Call::synchronize(const Context& of, const std::shared_ptr<Completion>& completion, const VectorClock& clock) {
  // More may be enqueued while this waits. NOLINTNEXTLINE(performance-unnecessary-copy-initialization)
  const VectorClock known = clock;
  simulator.wait(lock, completion);
  if (of.sticky != CUDA_SUCCESS) {
    simulator.learn_of_failure(lock, of);
    throw DriverError{of.sticky};
  }
  simulator.races.host_waited_for(known);
}

void Call::take(double seconds, std::mutex& one_at_a_time) {
  if (seconds <= 0) return;
  lock.unlock();
  {
    const std::scoped_lock busy(one_at_a_time);
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  }
  lock.lock();
}

void Call::finish() {
  Context* context = current_context();
  if (asynchronous_ != CUDA_SUCCESS && context != nullptr && context->sticky == CUDA_SUCCESS) {
    context->sticky = asynchronous_;
  }
}

CUresult border(const char* function, Needs needs, OnError on_error, const std::function<void(Call&)>& body) noexcept {
  try {
    Simulator& state = simulator();
    Lock lock(state.mutex);
    try {
      Call call(state, lock, function);
      call.check(needs);
      if (call.planned_error() == CUDA_SUCCESS || on_error == OnError::kReleaseAnyway) body(call);
      call.finish();
      return call.planned_error();
    } catch (const DriverError& error) {
      return error.result;
    } catch (const std::bad_alloc&) {
      return CUDA_ERROR_OUT_OF_MEMORY;
    } catch (const std::exception& error) {
      state.reports.add(std::string("SIMULATOR: ") + function + ": " + error.what());
      return CUDA_ERROR_UNKNOWN;
    }
  } catch (...) {
    return CUDA_ERROR_UNKNOWN;
  }
}

}  // namespace simcuda
