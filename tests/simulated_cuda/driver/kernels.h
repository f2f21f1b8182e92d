// Modules of PTX text, and launches of their kernels on the interpreter.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver/context.h"
#include "driver/streams.h"
#include "ptx/interpreter.h"

namespace simcuda {

struct Simulator;

struct Module {
  Context& context;
  std::shared_ptr<const ptx::Module> code;
};

struct Function {
  Context& context;
  const Module* module;  // whose end is the function's end
  std::shared_ptr<const ptx::Module> code;
  const ptx::Kernel& kernel;
};

// Text that was loaded once is not read again; and what was covered of it is still known when its modules are gone.
class ModuleCache {
 public:
  // Throws std::runtime_error naming the line that is not understood.
  std::shared_ptr<const ptx::Module> load(const std::string& text);

  // How much of all kernels was executed so far, in percent, and what was not.
  struct Coverage {
    int percent = 100;
    std::vector<std::string> never_executed;
  };
  Coverage coverage() const;

 private:
  std::unordered_map<std::string, std::shared_ptr<const ptx::Module>> modules_;
};

struct Launch {
  std::shared_ptr<const Function> function;
  ptx::Dim3 grid;
  ptx::Dim3 block;
  std::vector<std::byte> parameters;
};

// Runs a kernel and records what it touched. `work` is what its stream ordered. Not called with the simulator's lock.
CUresult run_kernel(Simulator& simulator, const Launch& launch, const std::shared_ptr<const Work>& work);

}  // namespace simcuda
