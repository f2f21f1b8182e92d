// One instruction as it is written: its parts are told apart, nothing is looked up yet.
#pragma once

#include <string>
#include <vector>

namespace simcuda::ptx {

enum class OperandKind {
  kName,  // register or label
  kNumber,
  kVector,   // {a, b}
  kAddress,  // [a] or [a+8]
};

struct OperandText {
  OperandKind kind = OperandKind::kName;
  std::vector<std::string> names;  // one, or those of a vector's elements
  std::string number;              // the value, or an address's offset; may be empty
};

enum class GuardSense { kTrue, kFalse };

struct Statement {
  int line = 0;
  std::string guard;  // empty: none
  GuardSense guard_sense = GuardSense::kTrue;
  std::string mnemonic;  // ld.global.u32
  std::vector<OperandText> operands;
};

}  // namespace simcuda::ptx
