// A kernel, loaded for one device. All of this needs the device's context to be current.
#pragma once

#include <optional>

#include "cuda/kernel_images.h"
#include "cuda/resources.h"

namespace dcp_fast::cuda {

struct Kernel {
  Module module;
  FunctionHandle function = nullptr;
};

// Takes milliseconds. None if no compiled form ships for this device, or the driver is too old for it.
// Throws Error(kCuda).
std::optional<Kernel> load_compiled_kernel(const KernelImages& images, Ordinal device);

// Takes some tenths of a second: the driver compiles the text. Throws Error(kCudaRefused) if it cannot, Error(kCuda).
Kernel compile_kernel(const KernelImages& images);

}  // namespace dcp_fast::cuda
