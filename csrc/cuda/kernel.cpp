#include "cuda/kernel.h"

#include "cuda/kernel_images.h"
#include "error.h"

namespace dcp_fast::cuda {

namespace {

constexpr const char* kName = "dcp_fast_box_copy";

int attribute(int wanted, Ordinal device) {
  int value = 0;
  DCP_FAST_CUDA(cuDeviceGetAttribute, &value, wanted, device);
  return value;
}

Kernel with_function(ModuleHandle handle) {
  Kernel kernel;
  kernel.module = Module(handle);
  DCP_FAST_CUDA(cuModuleGetFunction, &kernel.function, handle, kName);
  return kernel;
}

}  // namespace

std::optional<Kernel> load_compiled_kernel(Ordinal device) {
  const int major = attribute(kCapabilityMajor, device);
  const int minor = attribute(kCapabilityMinor, device);
  for (size_t i = 0; i < kBoxCopyBinaryCount; ++i) {
    const KernelBinary& binary = kBoxCopyBinaries[i];
    if (binary.major != major || binary.minor > minor) continue;
    ModuleHandle handle = nullptr;
    const Result result = driver().cuModuleLoadData(&handle, binary.image);
    if (result == kSuccess) return with_function(handle);
    if (!is_refusal(result)) check("cuModuleLoadData", result);
  }
  return std::nullopt;
}

Kernel compile_kernel() {
  ModuleHandle handle = nullptr;
  require("cuModuleLoadData", driver().cuModuleLoadData(&handle, kBoxCopyPtx));
  return with_function(handle);
}

}  // namespace dcp_fast::cuda
