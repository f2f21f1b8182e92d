// The CUDA driver, found when the first load needs it. Importing dcp_fast touches no driver, so a fork before the first
// CUDA load is safe, and a machine without CUDA never notices.
#pragma once

#include <cstddef>

#include "cuda/driver_abi.h"

namespace dcp_fast::cuda {

struct Driver {
#define DCP_FAST_DECLARE(name, parameters) Result(*name) parameters = nullptr;  // NOLINT(bugprone-macro-parentheses)
  DCP_FAST_DRIVER_CALLS(DCP_FAST_DECLARE)
#undef DCP_FAST_DECLARE
  // Only a simulator has this one. It tells the race detector that a thread is about to write memory that copies read.
  void (*simcuda_host_write)(const void* begin, size_t bytes, const char* who) = nullptr;
};

// The driver of this process, initialized: libcuda.so.1, or the library that DCP_FAST_LIBCUDA names. Thread-safe.
// Throws Error(kCuda) that says which call failed and why; a later call tries again.
const Driver& driver();

// Throws Error(kCuda), or Error(kCudaOutOfMemory), if the call that `function` names failed.
void check(const char* function, Result result);

// Whether a call failed but left its context usable: the driver refuses what was asked for, and other work goes on.
bool is_refusal(Result result);

// The same as check(), but throws Error(kCudaRefused) for a refusal.
void require(const char* function, Result result);

// Calls a function of the driver and checks its result.
#define DCP_FAST_CUDA(name, ...) ::dcp_fast::cuda::check(#name, ::dcp_fast::cuda::driver().name(__VA_ARGS__))

}  // namespace dcp_fast::cuda
