// Turns a statement into an instruction that can be executed, and refuses whatever it does not know for certain.
#pragma once

#include "ptx/program.h"
#include "ptx/statement.h"
#include "ptx/symbols.h"

namespace simcuda::ptx {

Instruction decode(const Statement& statement, Symbols& symbols);

}  // namespace simcuda::ptx
