// What the names and numbers in a kernel stand for. Hands out the slots of its program.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>

#include "ptx/program.h"

namespace simcuda::ptx {

constexpr int kPredicateBits = 1;

struct Register {
  Slot slot;
  int bits;
};

class Symbols {
 public:
  explicit Symbols(Program& program);

  void declare_register(const std::string& name, int bits, int line);
  void declare_label(const std::string& name, uint32_t target, int line);

  const Register& find_register(const std::string& name, int line) const;
  const Parameter& find_parameter(const std::string& name, int line) const;
  uint32_t find_label(const std::string& name, int line) const;
  // kNoSlot if there is none of this name.
  static Slot find_special_register(const std::string& name);
  // A number of so many bits, signed or not.
  Slot constant(const std::string& number, int bits, int line);

 private:
  Slot new_slot(uint64_t value, bool always_defined);

  Program& program_;
  std::unordered_map<std::string, Register> registers_;
  std::map<std::string, uint32_t> labels_;
  std::map<uint64_t, Slot> constants_;
};

// The value of a number as it is written in PTX: decimal or 0x, with a sign or not.
int64_t parse_number(const std::string& text, int line);

}  // namespace simcuda::ptx
