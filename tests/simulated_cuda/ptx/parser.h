// Reads a PTX module: its directives, and the kernels with their parameters, registers, labels and instructions.
#pragma once

#include <string>
#include <vector>

#include "ptx/program.h"

namespace simcuda::ptx {

// Throws std::runtime_error naming the line of anything that it does not know.
std::vector<Program> parse(const std::string& text);

}  // namespace simcuda::ptx
