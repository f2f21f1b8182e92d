// The border of every driver call: counting, faults, the checks that come before any work, and errors as results.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "driver/simulator.h"

namespace simcuda {

// What a call needs before it does anything.
enum class Needs {
  kNothing,
  kDriver,   // cuInit was called
  kContext,  // and the thread has a current context that nothing failed in
};

enum class OnError {
  kSkip,
  // A call that gives something back does so even where it has to fail: a program cannot do more than call it.
  kReleaseAnyway,
};

// The context that the calling thread has made current, or null.
Context*& current_context();
CUcontext handle_of(Context* context);
// Throws CUDA_ERROR_INVALID_CONTEXT for anything that is no context in use.
Context* context_of(const Simulator& simulator, CUcontext handle);

class Call {
 public:
  Call(Simulator& sim, Lock& held, const char* function);

  Simulator& simulator;
  Lock& lock;

  Context& context() const { return *current_context(); }
  // "cuMemAlloc_v2 #3", and more about the call in parentheses.
  std::string label(const std::string& more = "") const;

  void check(Needs needs);
  // The error that this call must return whatever it does: a fault, or an earlier failure.
  CUresult planned_error() const { return planned_error_; }

  // The stream that a handle means. Throws CUDA_ERROR_INVALID_HANDLE.
  std::shared_ptr<Stream> stream(CUstream handle);
  // Enqueues work that `work` was ordered for; an asynchronous fault hits it.
  void enqueue(Stream& stream, Operation operation);
  // Waits for work, and for the host's knowledge of it. Throws the error that its context failed with.
  void synchronize(const Context& of, const std::shared_ptr<Completion>& completion, const VectorClock& clock);
  // The call takes so long, as where a driver does one such thing at a time. Other calls go on.
  void take(double seconds, std::mutex& one_at_a_time);
  // An asynchronous fault of a call that enqueued nothing breaks the context all the same.
  void finish();

 private:
  [[noreturn]] void complain(CUresult result, const std::string& why);

  const char* function_;
  long number_ = 0;
  CUresult planned_error_ = CUDA_SUCCESS;
  CUresult asynchronous_ = CUDA_SUCCESS;
};

CUresult border(const char* function, Needs needs, OnError on_error, const std::function<void(Call&)>& body) noexcept;

template <typename Body>
CUresult call(const char* function, Needs needs, Body&& body) noexcept {
  return border(function, needs, OnError::kSkip, body);
}

template <typename Body>
CUresult release_call(const char* function, Needs needs, Body&& body) noexcept {
  return border(function, needs, OnError::kReleaseAnyway, body);
}

// Throws CUDA_ERROR_INVALID_VALUE unless the condition holds.
inline void require(bool condition) {
  if (!condition) throw DriverError{CUDA_ERROR_INVALID_VALUE};
}

}  // namespace simcuda
