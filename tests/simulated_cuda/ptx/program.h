// A kernel as it is executed: every name resolved, every instruction bound to the function that carries it out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ptx/interpreter.h"

namespace simcuda::ptx {

struct Instruction;
struct Thread;
using Operation = void (*)(const Instruction&, Thread&);

// Registers, constants and special registers all have a slot in one array of values, so that an operation need not ask
// what its operand is.
using Slot = uint32_t;
constexpr Slot kNoSlot = ~Slot{0};
constexpr uint32_t kNoTarget = ~uint32_t{0};

struct Instruction {
  Operation operation = nullptr;
  std::array<Slot, 5> operands{};  // in the order of the text, vectors element by element
  Slot guard = kNoSlot;
  uint64_t guard_holds_for = 1;  // the value that the guard must have
  uint64_t offset = 0;           // added to the address of a load or store
  uint32_t target = kNoTarget;   // of a branch: index of an instruction
  int line = 0;
};

// The first slots of every program.
enum SpecialRegister : Slot {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kSpecialRegisters,
};

struct Program {
  std::string name;
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0;
  uint64_t max_threads = 1024;  // in a block
  std::vector<Instruction> code;
  std::vector<uint64_t> initial_values;  // of every slot
  std::vector<bool> always_defined;      // constants and special registers, slot by slot
};

// The state of the thread that runs.
struct Thread {
  std::vector<uint64_t> values;      // slot by slot
  std::vector<uint64_t> written_by;  // number of the last thread that wrote the slot
  uint64_t number = 0;               // grows from thread to thread: what earlier ones wrote counts as undefined
  uint32_t next = 0;                 // index of the next instruction
  const std::vector<std::byte>* parameters = nullptr;
  Memory* memory = nullptr;
};

}  // namespace simcuda::ptx
