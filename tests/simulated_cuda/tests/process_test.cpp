// What concerns whole processes: they fork, end with work in flight, crash, and are configured by their environment.
// Each "in a process of its own" below is a test case that only runs when another one starts this program for it.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>
#include <vector>

#include "machine.h"

using namespace simcuda::testing;

namespace {

// Runs a skipped test case in a fresh process and returns the status that waitpid gives.
int run_alone(const std::string& test_case, std::vector<std::string> environment = {}) {
  std::string program = "/proc/self/exe";
  std::string filter = "--test-case=" + test_case;
  std::string no_skip = "--no-skip";
  std::string quiet = "--minimal";
  char* arguments[] = {program.data(), filter.data(), no_skip.data(), quiet.data(), nullptr};
  std::vector<char*> variables;
  for (std::string& variable : environment) variables.push_back(variable.data());
  for (char** variable = environ; *variable != nullptr; ++variable) variables.push_back(*variable);
  variables.push_back(nullptr);
  pid_t child = 0;
  REQUIRE(::posix_spawn(&child, program.c_str(), nullptr, nullptr, arguments, variables.data()) == 0);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return status;
}

bool succeeded(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }

}  // namespace

TEST_CASE("a forked child cannot use the driver, and does not hang") {
  const Machine machine;
  const StreamHandle stream;
  const DeviceBuffer buffer(100);
  PinnedBuffer host(100);
  simcuda_set("latency_us", 50000);
  OK(cuMemcpyHtoDAsync_v2(buffer, host.data(), 100, stream));
  const pid_t child = ::fork();
  if (child == 0) {
    int count = 0;
    const bool refused =
        cuInit(0) == CUDA_ERROR_NOT_INITIALIZED && cuDeviceGetCount(&count) == CUDA_ERROR_NOT_INITIALIZED &&
        cuStreamSynchronize(stream) == CUDA_ERROR_NOT_INITIALIZED && cuMemFree_v2(buffer) == CUDA_ERROR_NOT_INITIALIZED;
    std::_Exit(refused ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(succeeded(status));
  OK(cuStreamSynchronize(stream));
}

TEST_CASE("alone: before cuInit" * doctest::skip()) {
  int count = 0;
  CHECK(cuDeviceGetCount(&count) == CUDA_ERROR_NOT_INITIALIZED);
  CUcontext context = nullptr;
  CHECK(cuDevicePrimaryCtxRetain(&context, 0) == CUDA_ERROR_NOT_INITIALIZED);
  CHECK(cuCtxSynchronize() == CUDA_ERROR_NOT_INITIALIZED);
  OK(cuDriverGetVersion(&count));
  const pid_t child = ::fork();
  if (child == 0) std::_Exit(cuInit(0) == CUDA_SUCCESS && cuDeviceGetCount(&count) == CUDA_SUCCESS ? 0 : 1);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(succeeded(status));
  OK(cuInit(0));
}

TEST_CASE("only cuInit makes the driver usable, also in a child that was forked before it") {
  CHECK(succeeded(run_alone("alone: before cuInit")));
}

TEST_CASE("alone: ends with work in flight" * doctest::skip()) {
  // What outlives main() must have been made before the driver is, to be there when the driver stops its work.
  static std::vector<unsigned char> host(8 << 20);
  OK(cuInit(0));
  CUcontext context = nullptr;
  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxSetCurrent(context));
  OK(cuMemHostRegister_v2(host.data(), host.size(), 0));
  CUdeviceptr address = 0;
  OK(cuMemAlloc_v2(&address, host.size()));
  CUstream stream = nullptr;
  OK(cuStreamCreate(&stream, 0));
  simcuda_set("latency_us", 1e8);
  OK(cuMemcpyHtoDAsync_v2(address, host.data(), host.size(), nullptr));
  simcuda_set("latency_us", 0);
  for (int index = 0; index < 20; ++index) {
    OK(cuMemcpyHtoDAsync_v2(address, host.data(), host.size(), stream));
  }
}

TEST_CASE("a process ends although work is in flight") {
  CHECK(succeeded(run_alone("alone: ends with work in flight")));
}

TEST_CASE("alone: follows a device pointer" * doctest::skip()) {
  std::signal(SIGSEGV, SIG_DFL);
  const Machine machine;
  const DeviceBuffer buffer(100);
  *reinterpret_cast<volatile unsigned char*>(CUdeviceptr(buffer)) = 1;
}

TEST_CASE("a host that follows a device pointer crashes") {
  const int status = run_alone("alone: follows a device pointer");
  CHECK_FALSE(succeeded(status));
}

TEST_CASE("alone: environment" * doctest::skip()) {
  OK(cuInit(0));
  int value = 0;
  OK(cuDeviceGetCount(&value));
  CHECK(value == 3);
  OK(cuDriverGetVersion(&value));
  CHECK(value == 11080);
  CUcontext context = nullptr;
  OK(cuDevicePrimaryCtxRetain(&context, 2));
  OK(cuCtxSetCurrent(context));
  CUdeviceptr address = 0;
  CHECK(cuMemAlloc_v2(&address, 10) == CUDA_ERROR_UNKNOWN);
  CHECK(cuMemAlloc_v2(&address, 3 << 20) == CUDA_ERROR_OUT_OF_MEMORY);
  OK(cuMemAlloc_v2(&address, 1 << 20));
  OK(cuMemFree_v2(address));
  OK(cuDevicePrimaryCtxRelease_v2(2));
}

TEST_CASE("the environment configures the machine") {
  CHECK(succeeded(run_alone("alone: environment", {"SIMCUDA_DEVICES=3", "SIMCUDA_DRIVER_VERSION=11080",
                                                   "SIMCUDA_MEMORY_MB=2", "SIMCUDA_FAULT=cuMemAlloc_v2:1=999"})));
}
