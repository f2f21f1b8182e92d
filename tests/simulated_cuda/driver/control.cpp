#include "driver/control.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "driver/simulator.h"

namespace simcuda {

namespace {

void put(const std::string& text, char* buffer, int capacity) {
  if (buffer != nullptr && capacity > 0) std::snprintf(buffer, static_cast<size_t>(capacity), "%s", text.c_str());
}

std::string join_lines(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += (text.empty() ? "" : "\n") + line;
  return text;
}

// Whether the simulator has the function that a test wants to fail: a slip of the pen would test nothing.
bool exists(const char* function) {
  Dl_info here{};
  if (::dladdr(reinterpret_cast<const void*>(&simcuda_fault), &here) == 0) return true;
  void* library = ::dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return true;
  const bool found = ::dlsym(library, function) != nullptr;
  ::dlclose(library);
  return found;
}

void host_access(const void* begin, size_t bytes, const char* who, Access access) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  const auto first = reinterpret_cast<uint64_t>(begin);
  const Interval range{first, first + bytes};
  for (auto& [start, known] : state.host.ranges()) {
    if (known.range.overlaps(range))
      state.races.check_host(known.history, access, range, "the host, " + std::string(who));
  }
}

// Calls the function for one device, or for all where the ordinal is -1.
template <typename Function>
void for_devices(Simulator& state, int device, Function&& function) {
  for (const auto& context : state.contexts) {
    if (device < 0 || context->device == device) function(*context);
  }
}

}  // namespace

extern "C" {

void simcuda_host_write(const void* begin, size_t bytes, const char* who) {
  host_access(begin, bytes, who, Access::kWrite);
}

void simcuda_host_read(const void* begin, size_t bytes, const char* who) {
  host_access(begin, bytes, who, Access::kRead);
}

int simcuda_set(const char* key, double value) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  if (!state.settings.set(key, value)) return 0;
  if (std::string(key) == "seed") state.random.seed(state.settings.seed);
  state.races.enable(state.settings.races);
  return 1;
}

void simcuda_fault(const char* function, int nth_from_now, int error, int asynchronous) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  if (!exists(function)) state.reports.add("UNKNOWN: simcuda_fault: there is no function " + std::string(function));
  const FaultTime time = asynchronous != 0 ? FaultTime::kWork : FaultTime::kCall;
  state.faults.plan(function, nth_from_now, {static_cast<CUresult>(error), time});
}

long simcuda_calls(const char* function) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  return state.faults.calls(function);
}

int simcuda_reports(const char* containing, char* buffer, int capacity, int clear) {
  Reports& reports = simulator().reports;
  const std::vector<std::string> found = reports.containing(containing);
  put(join_lines(found), buffer, capacity);
  if (clear != 0) reports.clear();
  return static_cast<int>(found.size());
}

int simcuda_leaks(char* buffer, int capacity) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  size_t allocations = 0;
  size_t contexts = 0;
  for_devices(state, -1, [&](const Context& context) {
    allocations += context.memory.allocations().size();
    contexts += static_cast<size_t>(context.references);
  });
  const std::pair<const char*, size_t> counts[] = {
      {"device allocations", allocations}, {"pinned ranges", state.host.ranges().size()},
      {"streams", state.streams.size()},   {"events", state.events.size()},
      {"modules", state.modules.size()},   {"contexts", contexts},
  };
  std::string text;
  size_t total = 0;
  for (const auto& [name, count] : counts) {
    if (count > 0) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + name;
    total += count;
  }
  put(text, buffer, capacity);
  return static_cast<int>(total);
}

double simcuda_busy_seconds(int device, const char* kind, int reset) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  const bool copies = std::string(kind) == "copy";
  double sum = 0;
  for_devices(state, device, [&](Context& context) {
    double& seconds = copies ? context.copy_seconds : context.kernel_seconds;
    sum += seconds;
    if (reset != 0) seconds = 0;
  });
  return sum;
}

long simcuda_statistic(const char* name, int device, int reset) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  long sum = 0;
  bool known = true;
  for_devices(state, device, [&](Context& context) {
    const auto value = context.statistics.find(name);
    known = value != context.statistics.end();
    if (!known) return;
    sum += value->second;
    if (reset != 0) value->second = 0;
  });
  return known ? sum : -1;
}

void simcuda_reset(void) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  state.reports.clear();
  state.faults.clear();
  for_devices(state, -1, [](Context& context) {
    context.sticky = CUDA_SUCCESS;
    context.copy_seconds = 0;
    context.kernel_seconds = 0;
    context.reset_statistics();
  });
}

int simcuda_kernel_coverage(char* buffer, int capacity) {
  Simulator& state = simulator();
  const Lock lock(state.mutex);
  const ModuleCache::Coverage coverage = state.module_cache.coverage();
  put(join_lines(coverage.never_executed), buffer, capacity);
  return coverage.percent;
}

}  // extern "C"

}  // namespace simcuda
