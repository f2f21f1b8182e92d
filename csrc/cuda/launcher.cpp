#include "cuda/launcher.h"

#include <algorithm>
#include <exception>
#include <system_error>

namespace dcp_fast::cuda {

void Launcher::prepare() {
  {
    const std::scoped_lock lock(mutex_);
    throw_if_failed();
    if (state_ != State::kUnprepared) return;
    in_context_([this] {
      if (auto compiled = load_compiled_kernel(images_, device_)) {
        kernel_ = std::move(*compiled);
        state_ = State::kReady;
      }
    });
    if (state_ == State::kReady) return;
    state_ = State::kCompiling;
  }
  try {
    compiler_ = std::thread([this] { compile(); });
  } catch (const std::system_error&) {  // the system is out of threads
    compile();
  }
}

void Launcher::compile() noexcept {
  const auto fail = [this](const Error& error) {
    const std::scoped_lock lock(mutex_);
    error_ = error;
    state_ = State::kFailed;
    waiting_.clear();
  };
  try {
    in_context_([this] {
      Kernel kernel = compile_kernel(images_);
      const std::scoped_lock lock(mutex_);
      kernel_ = std::move(kernel);
      for (const auto& [slot, launch] : waiting_) launch(kernel_.function);
      waiting_.clear();
      state_ = State::kReady;
    });
  } catch (const Error& error) {
    fail(error);
  } catch (const std::exception& error) {
    fail(Error(ErrorKind::kCudaRefused, error.what()));
  }
  changed_.notify_all();
}

void Launcher::submit(size_t slot, Launch launch) {
  const std::scoped_lock lock(mutex_);
  throw_if_failed();
  if (state_ == State::kReady) {
    in_context_([&] { launch(kernel_.function); });
  } else {
    waiting_.emplace_back(slot, std::move(launch));
  }
}

bool Launcher::is_settled(size_t slot) {
  const std::scoped_lock lock(mutex_);
  return !waits(slot);
}

void Launcher::wait(size_t slot) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return !waits(slot); });
  throw_if_failed();
}

void Launcher::wait_for_all() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return state_ != State::kCompiling; });
  throw_if_failed();
}

void Launcher::join() noexcept {
  if (compiler_.joinable()) compiler_.join();
}

void Launcher::release() noexcept { kernel_ = {}; }

bool Launcher::waits(size_t slot) const {
  return std::any_of(waiting_.begin(), waiting_.end(), [slot](const auto& entry) { return entry.first == slot; });
}

void Launcher::throw_if_failed() const {
  if (error_) throw Error(*error_);
}

}  // namespace dcp_fast::cuda
