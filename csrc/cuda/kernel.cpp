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
  require("cuModuleGetFunction", driver().cuModuleGetFunction(&kernel.function, handle, kName));
  // Drivers load and compile a kernel only when somebody asks something of it.
  int registers = 0;
  require("cuFuncGetAttribute", driver().cuFuncGetAttribute(&registers, kFunctionRegisters, kernel.function));
  return kernel;
}

Kernel load(const void* image) {
  ModuleHandle handle = nullptr;
  require("cuModuleLoadData", driver().cuModuleLoadData(&handle, image));
  return with_function(handle);
}

}  // namespace

std::optional<Kernel> load_compiled_kernel(Ordinal device) {
  const int major = attribute(kCapabilityMajor, device);
  const int minor = attribute(kCapabilityMinor, device);
  for (size_t i = 0; i < kBoxCopyBinaryCount; ++i) {
    const KernelBinary& binary = kBoxCopyBinaries[i];
    if (binary.major != major || binary.minor > minor) continue;
    try {
      return load(binary.image);
    } catch (const Error& error) {
      if (error.kind != ErrorKind::kCudaRefused) throw;
    }
  }
  return std::nullopt;
}

Kernel compile_kernel() { return load(kBoxCopyPtx); }

}  // namespace dcp_fast::cuda
