// System calls that misbehave for as long as a scope lasts.
#pragma once

#include <utility>

#include "io/fault_injection.h"
#include "io/system_calls.h"

namespace dcp_fast::testing {

class ScopedCalls {
 public:
  explicit ScopedCalls(io::SystemCalls& calls) { io::set_system_calls(&calls); }
  ~ScopedCalls() { io::set_system_calls(nullptr); }
  ScopedCalls(const ScopedCalls&) = delete;
  ScopedCalls& operator=(const ScopedCalls&) = delete;
};

// Reads that throw, as where a buffer for them could not be had.
template <typename Exception>
class ThrowingReads final : public io::SystemCalls {
 public:
  explicit ThrowingReads(Exception exception) : exception_(std::move(exception)) {}
  ssize_t pread(int /*fd*/, void* /*buffer*/, size_t /*size*/, off_t /*offset*/) override { throw exception_; }
  ssize_t preadv(int /*fd*/, const iovec* /*vectors*/, int /*count*/, off_t /*offset*/) override { throw exception_; }

 private:
  Exception exception_;
};

inline io::Fault fault(io::FaultFunction function, int64_t nth, int error_number, int64_t repeat = 1,
                       size_t short_bytes = 1) {
  io::Fault result;
  result.function = function;
  result.nth = nth;
  result.error_number = error_number;
  result.repeat = repeat;
  result.short_bytes = short_bytes;
  return result;
}

}  // namespace dcp_fast::testing
