// Who gets SIGBUS, and pages that cause one.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <functional>
#include <stdexcept>

namespace dcp_fast::testing {

using Action = struct sigaction;

inline Action action_of_sigbus() {
  Action action{};
  ::sigaction(SIGBUS, nullptr, &action);
  return action;
}

inline bool is_same(const Action& a, const Action& b) {
  if (a.sa_flags != b.sa_flags || a.sa_handler != b.sa_handler) return false;
  for (int signal = 1; signal < NSIG; ++signal) {
    if (sigismember(&a.sa_mask, signal) != sigismember(&b.sa_mask, signal)) return false;
  }
  return true;
}

// Sets what SIGBUS does for as long as it lives.
class ScopedAction {
 public:
  explicit ScopedAction(const Action& action) { ::sigaction(SIGBUS, &action, &before_); }
  explicit ScopedAction(void (*handler)(int), int flags = 0) {
    Action action{};
    action.sa_handler = handler;
    action.sa_flags = flags;
    ::sigaction(SIGBUS, &action, &before_);
  }
  explicit ScopedAction(void (*handler)(int, siginfo_t*, void*), int flags = 0) {
    Action action{};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | flags;
    ::sigaction(SIGBUS, &action, &before_);
  }
  ~ScopedAction() { ::sigaction(SIGBUS, &before_, nullptr); }
  ScopedAction(const ScopedAction&) = delete;
  ScopedAction& operator=(const ScopedAction&) = delete;

 private:
  Action before_{};
};

// Memory of a file that has `there` bytes: whoever touches a page behind them gets SIGBUS.
class FilePages {
 public:
  explicit FilePages(size_t size, size_t there = 0) : size_(size), fd_(::memfd_create("pages", MFD_CLOEXEC)) {
    if (fd_ < 0 || ::ftruncate(fd_, static_cast<off_t>(there)) != 0) throw std::runtime_error("no memory file");
    data_ = static_cast<std::byte*>(::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0));
    if (data_ == MAP_FAILED) throw std::runtime_error("no mapping");
  }
  ~FilePages() {
    ::munmap(data_, size_);
    ::close(fd_);
  }
  FilePages(const FilePages&) = delete;
  FilePages& operator=(const FilePages&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  void resize(size_t there) const {
    if (::ftruncate(fd_, static_cast<off_t>(there)) != 0) throw std::runtime_error("cannot resize");
  }

 private:
  const size_t size_;
  const int fd_;
  std::byte* data_ = nullptr;
};

inline void touch(const std::byte* address) { static_cast<void>(*static_cast<const volatile std::byte*>(address)); }

// Runs `body` in a forked process. Returns its exit code, or minus the signal that ended it.
inline int in_child(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace dcp_fast::testing
