// The kernel of box_copy.cu, loaded for one device. All of this needs the device's context to be current.
#pragma once

#include <optional>

#include "cuda/resources.h"

namespace dcp_fast::cuda {

struct Kernel {
  Module module;
  FunctionHandle function = nullptr;
};

// Takes milliseconds. None if no compiled form ships for this device, or the driver is too old for it.
// Throws Error(kCuda).
std::optional<Kernel> load_compiled_kernel(Ordinal device);

// Takes some tenths of a second: the driver compiles the text. Throws Error(kCudaRefused) if it cannot, Error(kCuda).
Kernel compile_kernel();

}  // namespace dcp_fast::cuda
