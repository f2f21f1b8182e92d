// Runs PTX kernels on the host, thread after thread: a kernel that copies, computes with integers and branches. What
// goes beyond that (barriers, shared and local memory, atomics, floating point ...) is refused when a module is read,
// because threads that run one after another are a sound model only without it.
//
//   const Module module(text);
//   run(module.kernel("name"), {grid, 1, 1}, {block, 1, 1}, parameters, memory);
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace simcuda::ptx {

struct Program;

// What the kernel loads from and stores to.
struct Memory {
  virtual ~Memory() = default;
  // The bytes at a device address, valid until the next call. Throws std::runtime_error if the kernel may not touch
  // them.
  virtual std::byte* access(uint64_t address, size_t bytes, bool write) = 0;
};

// An access whose address is no multiple of its size: hardware ends the kernel then, although the host would not mind.
struct misaligned_access : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  uint32_t x, y, z;
};

struct Parameter {
  std::string name;
  size_t size;
  size_t offset;
};

// An instruction whose guard never held does not count as executed, so that a branch that was never taken shows up.
struct Coverage {
  size_t executed = 0;
  size_t total = 0;
  std::vector<int> lines_never_executed;
};

class Kernel {
 public:
  explicit Kernel(std::unique_ptr<const Program> program);
  ~Kernel();
  Kernel(Kernel&&) noexcept;
  Kernel& operator=(Kernel&&) noexcept;

  const std::string& name() const;
  const std::vector<Parameter>& parameters() const;
  size_t parameter_bytes() const;
  // Of all runs so far.
  Coverage coverage() const;

 private:
  friend uint64_t run(const Kernel& kernel, Dim3 grid, Dim3 block, const std::vector<std::byte>& parameters,
                      Memory& memory, uint64_t steps_per_thread);
  struct Executions;

  std::unique_ptr<const Program> program_;
  std::unique_ptr<Executions> executions_;
};

class Module {
 public:
  // Throws std::runtime_error naming the line of anything that it does not know.
  explicit Module(const std::string& text);

  const Kernel& kernel(const std::string& name) const;
  const std::map<std::string, Kernel>& kernels() const { return kernels_; }

 private:
  std::map<std::string, Kernel> kernels_;
};

// A thread that executes more instructions than this is taken to be in an endless loop.
constexpr uint64_t kStepsPerThread = uint64_t{1} << 30;

// Runs every thread of the grid and returns how many instructions that took. Parameters are laid out as
// Kernel::parameters says. Throws what Memory throws; misaligned_access; std::runtime_error for a launch that does not
// fit the kernel, a register that is read before it was written, a division by zero, or an endless loop. Several host
// threads may run the same kernel.
uint64_t run(const Kernel& kernel, Dim3 grid, Dim3 block, const std::vector<std::byte>& parameters, Memory& memory,
             uint64_t steps_per_thread = kStepsPerThread);

}  // namespace simcuda::ptx
