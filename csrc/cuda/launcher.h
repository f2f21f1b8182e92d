// Launches of one kernel on one device. While the driver still compiles it they wait here, and reading and copying go
// on.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/kernel.h"
#include "error.h"

namespace dcp_fast::cuda {

class Launcher {
 public:
  // Runs a function with the device's context; errors name the device.
  using InContext = std::function<void(const std::function<void()>&)>;
  // Enqueues one launch of the kernel, in the device's context.
  using Launch = std::function<void(FunctionHandle)>;

  // `in_context` must be good for as long as anything here goes on.
  Launcher(const KernelImages& images, Ordinal device, InContext in_context)
      : images_(images), device_(device), in_context_(std::move(in_context)) {}
  ~Launcher() { join(); }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Loads the kernel, or begins to compile it, if that has not been done. One thread does this before any submits.
  // Throws Error(kCuda, kCudaRefused).
  void prepare();

  // The rest is thread-safe, and throws Error(kCudaRefused) if there is no kernel, Error(kCuda) if a launch failed.

  // Launches for a slot, now or once the kernel is there.
  void submit(size_t slot, Launch launch);
  // Whether the slot's launch is enqueued, or never will be.
  bool is_settled(size_t slot);
  // Waits until it is enqueued. Throws if it never will be.
  void wait(size_t slot);
  // Waits until the launches of all slots are enqueued. Throws as wait() does.
  void wait_for_all();

  // Waits until the kernel is compiled and all launches that waited for it are enqueued.
  void join() noexcept;
  // Unloads the kernel.
  void release() noexcept;

 private:
  enum class State { kUnprepared, kCompiling, kReady, kFailed };

  void compile() noexcept;
  bool waits(size_t slot) const;
  void throw_if_failed() const;

  const KernelImages& images_;
  const Ordinal device_;
  const InContext in_context_;
  std::thread compiler_;
  std::mutex mutex_;  // for what follows
  std::condition_variable changed_;
  State state_ = State::kUnprepared;
  Kernel kernel_;
  std::optional<Error> error_;
  std::vector<std::pair<size_t, Launch>> waiting_;  // by slot
};

}  // namespace dcp_fast::cuda
