#include "ptx/interpreter.h"

#include <algorithm>
#include <array>
#include <limits>
#include <mutex>
#include <utility>

#include "ptx/lexer.h"
#include "ptx/operations.h"
#include "ptx/parser.h"
#include "ptx/program.h"

namespace simcuda::ptx {

struct Kernel::Executions {
  std::mutex mutex;
  std::vector<uint64_t> counts;  // instruction by instruction
};

namespace {

bool guard_holds(const Instruction& instruction, const Thread& thread) {
  if (instruction.guard == kNoSlot) return true;
  if (thread.written_by[instruction.guard] < thread.number) {
    throw error_at(instruction.line, "its guard is read before it is written");
  }
  return thread.values[instruction.guard] == instruction.guard_holds_for;
}

// Calls f(x, y, z) for every position, x fastest.
template <typename Function>
void for_each_position(Dim3 size, const Function& f) {
  for (uint32_t z = 0; z < size.z; ++z) {
    for (uint32_t y = 0; y < size.y; ++y) {
      for (uint32_t x = 0; x < size.x; ++x) f(Dim3{x, y, z});
    }
  }
}

class Launch {
 public:
  Launch(const Program& program, const std::vector<std::byte>& parameters, Memory& memory, uint64_t steps_per_thread)
      : program_(program), steps_per_thread_(steps_per_thread), counts_(program.code.size()) {
    thread_.values = program.initial_values;
    thread_.written_by.resize(program.initial_values.size());
    for (size_t slot = 0; slot < thread_.written_by.size(); ++slot) {
      if (program.always_defined[slot]) thread_.written_by[slot] = std::numeric_limits<uint64_t>::max();
    }
    thread_.parameters = &parameters;
    thread_.memory = &memory;
  }

  void run(Dim3 grid, Dim3 block) {
    set(kNtidX, block);
    set(kNctaidX, grid);
    for_each_position(grid, [&](Dim3 block_index) {
      set(kCtaidX, block_index);
      for_each_position(block, [&](Dim3 thread_index) {
        set(kTidX, thread_index);
        run_thread();
      });
    });
  }

  uint64_t steps() const { return steps_; }
  // How often each instruction was executed.
  const std::vector<uint64_t>& counts() const { return counts_; }

 private:
  void set(Slot first, Dim3 value) {
    thread_.values[first] = value.x;
    thread_.values[first + 1] = value.y;
    thread_.values[first + 2] = value.z;
  }

  void run_thread() {
    ++thread_.number;
    thread_.next = 0;
    uint64_t steps = 0;
    while (thread_.next != kReturned) {
      const uint32_t at = thread_.next++;
      const Instruction& instruction = program_.code[at];
      if (++steps > steps_per_thread_) throw error_at(instruction.line, "a thread that does not end");
      if (!guard_holds(instruction, thread_)) continue;
      ++counts_[at];
      instruction.operation(instruction, thread_);
    }
    steps_ += steps;
  }

  const Program& program_;
  uint64_t steps_per_thread_;
  std::vector<uint64_t> counts_;
  Thread thread_;
  uint64_t steps_ = 0;
};

uint64_t volume(Dim3 size) { return uint64_t{size.x} * size.y * size.z; }

}  // namespace

Kernel::Kernel(std::unique_ptr<const Program> program)
    : program_(std::move(program)), executions_(std::make_unique<Executions>()) {
  executions_->counts.resize(program_->code.size());
}
Kernel::~Kernel() = default;
Kernel::Kernel(Kernel&&) noexcept = default;
Kernel& Kernel::operator=(Kernel&&) noexcept = default;

const std::string& Kernel::name() const { return program_->name; }
const std::vector<Parameter>& Kernel::parameters() const { return program_->parameters; }
size_t Kernel::parameter_bytes() const { return program_->parameter_bytes; }

Coverage Kernel::coverage() const {
  const std::scoped_lock lock(executions_->mutex);
  Coverage result;
  result.total = program_->code.size();
  for (size_t i = 0; i < result.total; ++i) {
    if (executions_->counts[i] > 0) {
      ++result.executed;
    } else {
      result.lines_never_executed.push_back(program_->code[i].line);
    }
  }
  return result;
}

Module::Module(const std::string& text) {
  for (Program& program : parse(text)) {
    const std::string name = program.name;
    const bool added = kernels_.emplace(name, Kernel(std::make_unique<const Program>(std::move(program)))).second;
    if (!added) throw std::runtime_error("PTX: kernel " + name + " is declared twice");
  }
}

const Kernel& Module::kernel(const std::string& name) const {
  const auto found = kernels_.find(name);
  if (found == kernels_.end()) throw std::runtime_error("no kernel " + name + " in this module");
  return found->second;
}

uint64_t run(const Kernel& kernel, Dim3 grid, Dim3 block, const std::vector<std::byte>& parameters, Memory& memory,
             uint64_t steps_per_thread) {
  const Program& program = *kernel.program_;
  if (volume(grid) == 0 || volume(block) == 0 || volume(block) > program.max_threads) {
    throw std::runtime_error("kernel " + program.name + " cannot run blocks of " + std::to_string(volume(block)) +
                             " threads in a grid of " + std::to_string(volume(grid)));
  }
  if (parameters.size() < program.parameter_bytes) {
    throw std::runtime_error("kernel " + program.name + " needs " + std::to_string(program.parameter_bytes) +
                             " bytes of parameters");
  }
  Launch launch(program, parameters, memory, steps_per_thread);
  const auto count = [&] {
    const std::scoped_lock lock(kernel.executions_->mutex);
    std::transform(launch.counts().begin(), launch.counts().end(), kernel.executions_->counts.begin(),
                   kernel.executions_->counts.begin(), std::plus<>());
  };
  try {
    launch.run(grid, block);
  } catch (...) {
    count();
    throw;
  }
  count();
  return launch.steps();
}

}  // namespace simcuda::ptx
