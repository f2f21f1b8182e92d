#include <cstring>
#include <string>

#include "kernel_texts.h"
#include "machine.h"

using namespace simcuda::testing;

TEST_CASE("kernels run in the order of their stream") {
  const Machine machine;
  const Kernels kernels;
  const StreamHandle stream;
  const DeviceBuffer from(4000);
  const DeviceBuffer to(4000);
  OK(cuMemsetD8Async(from, 1, 4000, stream));
  kernels.copy_words(to, from, 999, stream);
  OK(cuStreamSynchronize(stream));
  std::vector<unsigned char> expected = bytes_of(4000, 1);
  std::memset(expected.data() + 3996, 0xCB, 4);
  CHECK(to.read() == expected);
  CHECK(simcuda_statistic("launches", 0, 0) == 1);
  CHECK(simcuda_statistic("blocks", 0, 0) == 32);
  CHECK(simcuda_busy_seconds(0, "kernel", 1) > 0);
  CHECK(simcuda_busy_seconds(1, "kernel", 0) == 0);
}

TEST_CASE("modules that cannot be loaded say so") {
  const Machine machine;
  CUmodule module = nullptr;
  CHECK(cuModuleLoadData(&module,
                         "\x7f"
                         "ELF and more") == CUDA_ERROR_NO_BINARY_FOR_GPU);
  CHECK(cuModuleLoadData(&module, ".version 6.0\nnonsense") == CUDA_ERROR_INVALID_PTX);
  Machine::expect("PTX");
  const Kernels kernels;
  CUfunction function = nullptr;
  CHECK(cuModuleGetFunction(&function, kernels.module(), "missing") == CUDA_ERROR_NOT_FOUND);
}

TEST_CASE("functions go with their module") {
  const Machine machine;
  CUfunction function = nullptr;
  {
    const Kernels kernels;
    function = kernels.copy_words();
  }
  CHECK(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, nullptr, nullptr, nullptr) == CUDA_ERROR_INVALID_HANDLE);
}

TEST_CASE("launches of impossible shapes are refused") {
  const Machine machine;
  const Kernels kernels;
  CUdeviceptr address = 0;
  uint32_t count = 0;
  void* parameters[] = {&address, &address, &count};
  const auto launch = [&](unsigned int grid, unsigned int block, void** values) {
    return cuLaunchKernel(kernels.copy_words(), grid, 1, 1, block, 1, 1, 0, nullptr, values, nullptr);
  };
  CHECK(launch(0, 32, parameters) == CUDA_ERROR_INVALID_VALUE);
  CHECK(launch(1, 1025, parameters) == CUDA_ERROR_INVALID_VALUE);
  CHECK(launch(0x80000000, 32, parameters) == CUDA_ERROR_INVALID_VALUE);
  CHECK(launch(1, 32, nullptr) == CUDA_ERROR_INVALID_VALUE);
  OK(launch(1, 1024, parameters));
  OK(cuCtxSynchronize());
}

TEST_CASE("a kernel, its stream and the current context belong together") {
  Machine machine;
  const Kernels kernels;
  const DeviceBuffer buffer(4);
  CUdeviceptr address = buffer;
  uint32_t count = 0;
  void* parameters[] = {&address, &address, &count};
  machine.use(1);
  CHECK(cuLaunchKernel(kernels.copy_words(), 1, 1, 1, 1, 1, 1, 0, nullptr, parameters, nullptr) ==
        CUDA_ERROR_INVALID_HANDLE);
  Machine::expect("CONTEXT: cuLaunchKernel");
  machine.use(0);
}

TEST_CASE("a kernel that runs out of bounds breaks its context, and only that") {
  Machine machine;
  machine.use(1);
  const DeviceBuffer elsewhere(400);
  machine.use(0);
  std::vector<unsigned char> host(400, 7);
  CUdeviceptr to = 0;
  CUdeviceptr from = 0;
  OK(cuMemAlloc_v2(&to, 400));
  OK(cuMemAlloc_v2(&from, 400));
  OK(cuMemHostRegister_v2(host.data(), host.size(), 0));
  OK(cuMemsetD8Async(from, 1, 400, nullptr));
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  OK(cuModuleLoadData(&module, kCopyWords));
  OK(cuModuleGetFunction(&function, module, "copy_words"));
  uint32_t count = 101;
  const char* kind = "OUT-OF-BOUNDS";
  CUresult error = CUDA_ERROR_ILLEGAL_ADDRESS;
  SUBCASE("over the end") {}
  SUBCASE("in the memory of another device") {
    count = 1;
    to = elsewhere;
  }
  SUBCASE("in host memory") {
    count = 1;
    to = reinterpret_cast<CUdeviceptr>(host.data());
  }
  SUBCASE("at an address that is not aligned") {
    count = 1;
    to += 2;
    kind = "MISALIGNED";
    error = CUDA_ERROR_MISALIGNED_ADDRESS;
  }
  void* parameters[] = {&to, &from, &count};
  OK(cuLaunchKernel(function, 4, 1, 1, 32, 1, 1, 0, nullptr, parameters, nullptr));
  // What was queued behind it is not done.
  cuMemcpyDtoHAsync_v2(host.data(), from, 400, nullptr);
  CHECK(cuStreamSynchronize(nullptr) == error);
  CHECK(host == bytes_of(400, 7));
  Machine::expect(kind);
  CHECK(cuMemAlloc_v2(&to, 4) == error);
  CHECK(cuCtxSynchronize() == error);
  // These fail as on hardware, but the program cannot do more, so that nothing counts as left.
  CHECK(cuMemFree_v2(from) == error);
  CHECK(cuMemHostUnregister(host.data()) == error);
  CHECK(cuModuleUnload(module) == error);
  std::string text(1000, '\0');
  simcuda_leaks(text.data(), static_cast<int>(text.size()));
  CHECK(std::string(text.c_str()) == "2 device allocations, 2 contexts");
  machine.use(1);
  CHECK(elsewhere.read() == bytes_of(400, 0xCB));

  machine.use(0);
  OK(cuDevicePrimaryCtxRelease_v2(0));
  Machine::expect("LEAK: the context of device 0 was released with 1 objects");
  CUcontext again = nullptr;
  OK(cuDevicePrimaryCtxRetain(&again, 0));
  machine.use(1);
}

TEST_CASE("a kernel in freed memory is told from one out of bounds") {
  Machine machine;
  const Kernels kernels;
  CUdeviceptr freed = 0;
  OK(cuMemAlloc_v2(&freed, 400));
  OK(cuMemFree_v2(freed));
  const DeviceBuffer to(400);
  kernels.copy_words(to, freed, 1, nullptr);
  CHECK(cuStreamSynchronize(nullptr) == CUDA_ERROR_ILLEGAL_ADDRESS);
  Machine::expect("USE-AFTER-FREE");
}

TEST_CASE("coverage names the lines that never ran") {
  const Machine machine;
  const std::string text = std::string(kCopyWords) + "// a module of its own, so that no other test covers it\n";
  CUmodule module = nullptr;
  CUfunction function = nullptr;
  OK(cuModuleLoadData(&module, text.c_str()));
  OK(cuModuleGetFunction(&function, module, "copy_words"));
  CUdeviceptr none = 0;
  uint32_t count = 0;
  void* parameters[] = {&none, &none, &count};
  OK(cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, nullptr, parameters, nullptr));
  OK(cuCtxSynchronize());
  OK(cuModuleUnload(module));
  std::string lines(10000, '\0');
  CHECK(simcuda_kernel_coverage(lines.data(), static_cast<int>(lines.size())) < 100);
  CHECK(lines.find("copy_words line ") != std::string::npos);
}
