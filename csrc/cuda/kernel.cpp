#include "cuda/kernel.h"

#include "error.h"

namespace dcp_fast::cuda {

namespace {

int attribute(int wanted, Ordinal device) {
  int value = 0;
  DCP_FAST_CUDA(cuDeviceGetAttribute, &value, wanted, device);
  return value;
}

Kernel with_function(ModuleHandle handle, const char* name) {
  Kernel kernel;
  kernel.module = Module(handle);
  require("cuModuleGetFunction", driver().cuModuleGetFunction(&kernel.function, handle, name));
  // Drivers load and compile a kernel only when somebody asks something of it.
  int registers = 0;
  require("cuFuncGetAttribute", driver().cuFuncGetAttribute(&registers, kFunctionRegisters, kernel.function));
  return kernel;
}

Kernel load(const void* image, const char* name) {
  ModuleHandle handle = nullptr;
  require("cuModuleLoadData", driver().cuModuleLoadData(&handle, image));
  return with_function(handle, name);
}

}  // namespace

std::optional<Kernel> load_compiled_kernel(const KernelImages& images, Ordinal device) {
  const int major = attribute(kCapabilityMajor, device);
  const int minor = attribute(kCapabilityMinor, device);
  for (size_t i = 0; i < images.binary_count; ++i) {
    const KernelBinary& binary = images.binaries[i];
    if (binary.major != major || binary.minor > minor) continue;
    try {
      return load(binary.image, images.name);
    } catch (const Error& error) {
      if (error.kind != ErrorKind::kCudaRefused) throw;
    }
  }
  return std::nullopt;
}

Kernel compile_kernel(const KernelImages& images) { return load(images.ptx, images.name); }

}  // namespace dcp_fast::cuda
