// When the driver is touched, and what happens where it is missing or fails to start.

#include "cuda/driver.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "child.h"
#include "device_load.h"
#include "doctest/doctest.h"
#include "error.h"
#include "test_device.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using cuda::PinnedRing;

namespace {

// The driver is the library that this variable names, while it is set.
constexpr const char* kVariable = "DCP_FAST_LIBCUDA";

void set_library(const char* name) { ::setenv(kVariable, name, 1); }  // NOLINT(concurrency-mt-unsafe)

std::string library() {
  const char* name = std::getenv(kVariable);  // NOLINT(concurrency-mt-unsafe)
  return name != nullptr ? name : "libcuda.so.1";
}

std::string error_of_device(int ordinal) {
  PinnedRing ring(kMiB, kMiB, kMiB);
  try {
    ring.device(ordinal);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// The error of a first attempt, and whether a second one succeeds once the right library is there.
std::string attempt_with(const char* name) {
  const std::string right = library();
  set_library(name);
  const std::string error = error_of_device(0);
  set_library(right.c_str());
  const std::string again = error_of_device(0);
  return again.empty() ? error : "again: " + again;
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("driver: a library that is missing or not the driver's is an error that says why, until it is right") {
  if (simulator() == nullptr) return;
  const std::string missing = in_child([] { return attempt_with("/nowhere/libcuda.so"); });
  CHECK_MESSAGE(contains(missing, "cuda:0: the CUDA driver cannot be loaded: dlopen: /nowhere/libcuda.so"), missing);
  const std::string other = in_child([] { return attempt_with("libm.so.6"); });
  CHECK_MESSAGE(contains(other, "cuda:0: the CUDA driver libm.so.6 lacks a call: dlsym: "), other);
  CHECK_MESSAGE(contains(other, "cuInit"), other);
}

TEST_CASE("driver: a start that fails is an error that says why, until it succeeds") {
  if (simulator() == nullptr) return;
  constexpr int kNoDevice = 100;
  const std::string answer = in_child([] {
    simulator()->fault("cuInit", 1, kNoDevice, 0);
    const std::string error = error_of_device(0);
    const std::string again = error_of_device(0);
    return again.empty() ? error : "again: " + again;
  });
  CHECK_MESSAGE(contains(answer, "cuda:0: cuInit failed: CUDA_ERROR_NO_DEVICE ("), answer);
}

TEST_CASE("driver: a device that does not exist is an error that names it") {
  if (simulator() == nullptr) return;
  const std::string answer = in_child([] { return error_of_device(99) + take_reports() + leaks(); });
  CHECK_MESSAGE(contains(answer, "cuda:99: cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE ("), answer);
}

TEST_CASE("driver: loads to the host alone never touch it") {
  const auto load_to_host = [](PinnedRing* ring) {
    CheckpointFiles files(1);
    Random random(3);
    files.add_random(random, 0, checkpoint::DType{0}, {100, 100}, true);
    files.write();
    std::string memory(40000, '#');
    transfer::Destination destination;
    destination.data = data_of(memory);
    destination.device = transfer::kHost;
    destination.dtype = checkpoint::DType{0};
    destination.sizes = {100, 100};
    destination.strides = {100, 1};
    transfer::Item item;
    item.storage_offsets = {0, 0};
    item.destination_offsets = {0, 0};
    item.lengths = {100, 100};
    const transfer::Layouts layouts = files.layouts({});
    const transfer::Program program(layouts, {item}, {destination});
    transfer::CudaTargets targets;
    targets.ring = ring;
    transfer::run_wave(program, 0, {}, targets, never);
    return memory == files.stored[0].storage ? "" : "the wrong bytes arrived";
  };
  CHECK(in_child([&] {
          set_library("/nowhere/libcuda.so");
          return load_to_host(nullptr);
        }) == "");
  CHECK(in_child([&] {
          PinnedRing ring(kMiB, kMiB, kMiB);
          const std::string result = load_to_host(&ring);
          if (simulator() == nullptr) return result;
          return simulator()->calls("") == 0 ? result : "the driver was called";
        }) == "");
}

TEST_CASE("driver: a child of a process that has not loaded to a GPU can") {
  if (simulator() == nullptr) return;
  const auto load = [] {
    Matrix matrix(64, 64);
    matrix.want(0, {0, 0}, {64, 64});
    Gpu gpu(kMiB, kMiB);
    const transfer::Layouts layouts = matrix.files.layouts({});
    const transfer::Program program(layouts, matrix.items, matrix.destinations);
    gpu.run(program, {});
    gpu.synchronize();
    return std::string(matrix.arrived() ? "" : "the wrong bytes arrived");
  };
  CHECK(in_child([&] {
          // As where a library was imported that has a ring ready before data loaders fork.
          const PinnedRing ring(kMiB, kMiB, kMiB);
          return in_child(load);
        }) == "");
}
