// Single-instruction mutants of PTX text: every small mistake that a list of substitutions makes. A test that does not
// notice one has a gap, or the mutant does the same as the original.
#pragma once

#include <string>
#include <vector>

namespace simcuda::testing {

struct Mutant {
  int line;
  std::string before;  // the line
  std::string after;
};

// Of each instruction: its guard dropped or turned around, its opcode, comparison or type exchanged, numbers changed,
// operands swapped or replaced by another register of their kind, its branch led astray, itself deleted.
std::vector<Mutant> mutants_of(const std::string& ptx);

std::string mutated(const Mutant& mutant, const std::string& ptx);

}  // namespace simcuda::testing
