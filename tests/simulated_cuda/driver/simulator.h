// All that the simulated driver knows, and the one lock that guards it.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "driver/context.h"
#include "driver/events.h"
#include "driver/faults.h"
#include "driver/handles.h"
#include "driver/host_memory.h"
#include "driver/kernels.h"
#include "driver/races.h"
#include "driver/reports.h"
#include "driver/settings.h"
#include "driver/streams.h"

namespace simcuda {

using Lock = std::unique_lock<std::mutex>;

struct Simulator {
  Simulator();

  std::mutex mutex;
  std::condition_variable progress;  // some work was done, or the process ends
  std::mutex pinning;                // held by a call that takes its time for that; never together with the other two
  std::mutex compiling;              // likewise
  bool initialized = false;
  bool forked = false;  // from the process that initialized the driver: no call works any more
  bool ending = false;

  Settings settings;
  std::mt19937_64 random;
  Reports reports;
  Faults faults;
  RaceDetector races{reports};
  HostMemory host;
  std::vector<std::unique_ptr<Context>> contexts;
  HandleTable<CUstream, Stream> streams;
  HandleTable<CUevent, Event> events;
  HandleTable<CUmodule, Module> modules;
  HandleTable<CUfunction, Function> functions;
  ModuleCache module_cache;
  int streams_made = 0;

  void initialize();
  // The context of a device. Throws CUDA_ERROR_INVALID_DEVICE.
  Context& context_of(int device);
  // The device whose memory the address belongs to, or null for a host address.
  Context* owner_of(uint64_t address);

  // Waits until work is done, or the process ends.
  void wait(Lock& lock, std::shared_ptr<const Completion> completion);
  // Waits for all that was enqueued in a context, or in all contexts for null.
  void drain(Lock& lock, const Context* context);
  // The host learns that a context failed: all its work is over then, done or not.
  void learn_of_failure(Lock& lock, const Context& context);
  // Destroys all that a context holds.
  void clear(Lock& lock, Context& context);
};

// It is never destroyed, since threads of streams may outlive main().
Simulator& simulator();

}  // namespace simcuda
