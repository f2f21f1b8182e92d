#include "driver/kernels.h"

#include <algorithm>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "driver/simulator.h"
#include "driver/touched.h"

namespace simcuda {

namespace {

// The memory of the device as a kernel sees it: live allocations only. What was touched is recorded on the way.
class KernelMemory final : public ptx::Memory {
 public:
  KernelMemory(Simulator& simulator, Context& context) : simulator_(simulator), memory_(context.memory) {}

  std::byte* access(uint64_t address, size_t bytes, bool write) override {
    Side& side = write ? writes_ : reads_;
    const Interval wanted{address, address + bytes};
    if (!side.live.covers(wanted)) side.live = find(wanted, write);
    side.touched.add(address, bytes);
    return memory_.alias(address);
  }

  // Called with the simulator's lock.
  void record(const std::shared_ptr<const Work>& work) {
    record(reads_, Access::kRead, work);
    record(writes_, Access::kWrite, work);
  }

 private:
  struct Side {
    Interval live;  // the allocation of the last access
    TouchedBytes touched;
  };

  // Nothing can be freed while a kernel runs, so that what was found once stays valid.
  Interval find(Interval wanted, bool write) {
    const Lock lock(simulator_.mutex);
    if (const Allocation* allocation = memory_.find(wanted)) return allocation->range;
    const std::string what = write ? "a store" : "a load";
    const Context* owner = simulator_.owner_of(wanted.begin);
    if (owner == nullptr) throw std::runtime_error("OUT-OF-BOUNDS: " + what + " at a host address");
    if (!memory_.owns(wanted.begin)) {
      throw std::runtime_error("OUT-OF-BOUNDS: " + what + " in the memory of device " + std::to_string(owner->device));
    }
    throw std::runtime_error(memory_.what_is_wrong_with(wanted) + ", in " + what);
  }

  void record(Side& side, Access access, const std::shared_ptr<const Work>& work) {
    Intervals rest = side.touched.intervals();
    for (auto begin = rest.begin(); begin != rest.end();) {
      Allocation* allocation = memory_.find(begin->begin);
      const auto end = std::find_if(begin, rest.end(),
                                    [&](const Interval& interval) { return !allocation->range.covers(interval); });
      simulator_.races.record(allocation->history, work, access, Intervals(begin, end));
      begin = end;
    }
  }

  Simulator& simulator_;
  DeviceMemory& memory_;
  Side reads_;
  Side writes_;
};

}  // namespace

std::shared_ptr<const ptx::Module> ModuleCache::load(const std::string& text) {
  std::shared_ptr<const ptx::Module>& module = modules_[text];
  try {
    if (module == nullptr) module = std::make_shared<const ptx::Module>(text);
  } catch (...) {
    modules_.erase(text);
    throw;
  }
  return module;
}

ModuleCache::Coverage ModuleCache::coverage() const {
  Coverage result;
  size_t executed = 0;
  size_t total = 0;
  for (const auto& [text, module] : modules_) {
    for (const auto& [name, kernel] : module->kernels()) {
      const ptx::Coverage coverage = kernel.coverage();
      executed += coverage.executed;
      total += coverage.total;
      for (const int line : coverage.lines_never_executed) {
        result.never_executed.push_back(name + " line " + std::to_string(line));
      }
    }
  }
  if (total > 0) result.percent = static_cast<int>(100 * executed / total);
  return result;
}

CUresult run_kernel(Simulator& simulator, const Launch& launch, const std::shared_ptr<const Work>& work) {
  Context& context = launch.function->context;
  KernelMemory memory(simulator, context);
  const std::scoped_lock compute(context.compute);
  const Clock::time_point start = Clock::now();
  CUresult result = CUDA_SUCCESS;
  try {
    ptx::run(launch.function->kernel, launch.grid, launch.block, launch.parameters, memory);
  } catch (const ptx::misaligned_access& error) {
    simulator.reports.add("MISALIGNED: " + work->label + ": " + error.what());
    result = CUDA_ERROR_MISALIGNED_ADDRESS;
  } catch (const std::exception& error) {
    const std::string text = error.what();
    const bool address =
        text.find("OUT-OF-BOUNDS") != std::string::npos || text.find("USE-AFTER-FREE") != std::string::npos;
    simulator.reports.add(address ? text + ": " + work->label : "KERNEL: " + work->label + ": " + text);
    result = address ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_ERROR_LAUNCH_FAILED;
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const Lock lock(simulator.mutex);
  context.kernel_seconds += seconds;
  memory.record(work);
  return result;
}

}  // namespace simcuda
