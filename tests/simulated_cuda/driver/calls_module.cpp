// Driver calls: modules and kernel launches.
#include <cstring>
#include <exception>
#include <memory>
#include <utility>

#include "driver/call.h"

namespace simcuda {

namespace {

// What the documentation of the driver gives as limits of every device.
void check_shape(ptx::Dim3 grid, ptx::Dim3 block) {
  constexpr uint32_t kMostThreads = 1024;
  constexpr uint32_t kMostThreadsInZ = 64;
  constexpr uint32_t kMostBlocksInX = 0x7fffffff;
  constexpr uint32_t kMostBlocks = 65535;
  require(grid.x > 0 && grid.y > 0 && grid.z > 0 && block.x > 0 && block.y > 0 && block.z > 0);
  require(grid.x <= kMostBlocksInX && grid.y <= kMostBlocks && grid.z <= kMostBlocks);
  require(block.x <= kMostThreads && block.y <= kMostThreads && block.z <= kMostThreadsInZ);
  require(uint64_t{block.x} * block.y * block.z <= kMostThreads);
}

std::vector<std::byte> gather_parameters(const ptx::Kernel& kernel, void** values) {
  std::vector<std::byte> bytes(kernel.parameter_bytes());
  size_t index = 0;
  for (const ptx::Parameter& parameter : kernel.parameters()) {
    require(values != nullptr && values[index] != nullptr);
    std::memcpy(bytes.data() + parameter.offset, values[index++], parameter.size);
  }
  return bytes;
}

bool is_binary(const void* image) {
  const char kElf[] = {'\x7f', 'E', 'L', 'F'};
  const char kFatBinary[] = {'\x50', '\xed', '\x55', '\xba'};
  return std::memcmp(image, kElf, sizeof(kElf)) == 0 || std::memcmp(image, kFatBinary, sizeof(kFatBinary)) == 0;
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuModuleLoadData(CUmodule* handle, const void* image) {
  return call("cuModuleLoadData", Needs::kContext, [&](Call& call) {
    require(handle != nullptr && image != nullptr);
    if (is_binary(image)) throw DriverError{CUDA_ERROR_NO_BINARY_FOR_GPU};
    call.take(call.simulator.settings.compile_seconds, call.simulator.compiling);
    try {
      auto code = call.simulator.module_cache.load(static_cast<const char*>(image));
      *handle = call.simulator.modules.add(std::make_shared<Module>(Module{call.context(), std::move(code)}));
    } catch (const std::runtime_error& error) {
      call.simulator.reports.add("PTX: " + call.label() + ": " + error.what());
      throw DriverError{CUDA_ERROR_INVALID_PTX};
    }
  });
}

CUresult CUDAAPI cuModuleUnload(CUmodule handle) {
  return release_call("cuModuleUnload", Needs::kContext, [&](Call& call) {
    const auto module = call.simulator.modules.take(handle);
    call.simulator.functions.remove_if([&](const Function& function) { return function.module == module.get(); });
  });
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* handle, CUmodule module_handle, const char* name) {
  return call("cuModuleGetFunction", Needs::kContext, [&](Call& call) {
    require(handle != nullptr && name != nullptr);
    const auto module = call.simulator.modules.get(module_handle);
    const auto kernel = module->code->kernels().find(name);
    if (kernel == module->code->kernels().end()) throw DriverError{CUDA_ERROR_NOT_FOUND};
    Function function{module->context, module.get(), module->code, kernel->second};
    *handle = call.simulator.functions.add(std::make_shared<Function>(std::move(function)));
  });
}

CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute wanted, CUfunction handle) {
  return call("cuFuncGetAttribute", Needs::kContext, [&](Call& call) {
    require(value != nullptr && wanted == CU_FUNC_ATTRIBUTE_NUM_REGS);
    static_cast<void>(call.simulator.functions.get(handle));
    *value = 32;  // of a device that is none
  });
}

CUresult CUDAAPI cuLaunchKernel(CUfunction handle, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                                unsigned int block_x, unsigned int block_y, unsigned int block_z,
                                unsigned int shared_bytes, CUstream stream_handle, void** parameters, void** extra) {
  return call("cuLaunchKernel", Needs::kContext, [&](Call& call) {
    require(extra == nullptr && shared_bytes == 0);
    const auto function = call.simulator.functions.get(handle);
    const auto stream = call.stream(stream_handle);
    // Copies may go to a stream of another device than the current one, kernels may not.
    if (&stream->context() != &call.context() || &function->context != &call.context()) {
      call.simulator.reports.add("CONTEXT: " + call.label() + ": kernel, stream and current context differ in device");
      throw DriverError{CUDA_ERROR_INVALID_HANDLE};
    }
    Launch launch{function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, {}};
    check_shape(launch.grid, launch.block);
    launch.parameters = gather_parameters(function->kernel, parameters);
    ++call.context().statistics["launches"];
    call.context().statistics["blocks"] += static_cast<long>(grid_x) * grid_y * grid_z;

    Simulator& simulator = call.simulator;
    const auto work = stream->order(call.label(function->kernel.name()));
    simulator.races.kernel_launched(work);
    Operation operation;
    operation.run = [&simulator, launch = std::move(launch), work] { return run_kernel(simulator, launch, work); };
    operation.ended = [&simulator, work] { simulator.races.kernel_ended(work); };
    call.enqueue(*stream, std::move(operation));
  });
}

}  // extern "C"

}  // namespace simcuda
