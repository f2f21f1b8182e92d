#include "io/guarded_copy.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <mutex>

namespace dcp_fast::io {

namespace {

using Action = struct sigaction;

constexpr int kOnce = static_cast<int>(SA_RESETHAND);  // a flag: the default action comes back with the first call

// A place for a copy under way. Only the handler on the copy's own thread looks at more than `thread`.
struct Place {
  std::atomic<pid_t> thread{0};  // 0: the next copy may have it
  MemoryRange source;
  MemoryRange destination;
  sigjmp_buf back;
  Place* next = nullptr;
};

// The handler may be called at any time, on any thread, so it takes no lock. What it reads is never freed, and never
// changes while it could be read.
std::atomic<Place*> places{nullptr};
std::atomic<const Action*> before{nullptr};  // the action that ours stands in for

pid_t this_thread() { return static_cast<pid_t>(::syscall(SYS_gettid)); }

// Whether the thread that gets the signal touched `si_addr`. A signal that somebody sent has no address.
bool is_fault(const siginfo_t& info) {
  return info.si_code == BUS_ADRERR || info.si_code == BUS_OBJERR || info.si_code == BUS_MCEERR_AR;
}

// Whatever the flags say: the default action and the ignored one may come with SA_SIGINFO, too. Both kinds of handlers
// are in the same place.
bool has_handler(const Action& action) { return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN; }

void set_default_action() {
  Action action{};
  action.sa_handler = SIG_DFL;
  ::sigaction(SIGBUS, &action, nullptr);
}

// Does what would have happened without our handler.
void hand_on(const Action& action, int signal, siginfo_t* info, void* context) {
  if (!has_handler(action)) {
    if (action.sa_handler == SIG_IGN && !is_fault(*info)) return;
    // A fault comes again when this returns, and cannot be ignored. A signal that was sent must be sent again.
    set_default_action();
    if (!is_fault(*info)) static_cast<void>(::raise(signal));
    return;
  }
  if ((action.sa_flags & kOnce) != 0) set_default_action();
  if ((action.sa_flags & SA_SIGINFO) != 0) return action.sa_sigaction(signal, info, context);
  action.sa_handler(signal);
}

void handle(int signal, siginfo_t* info, void* context) {
  const int error_number = errno;
  if (is_fault(*info)) {
    const pid_t thread = this_thread();
    for (Place* place = places.load(std::memory_order_acquire); place != nullptr; place = place->next) {
      if (place->thread.load(std::memory_order_relaxed) != thread) continue;
      if (place->source.holds(info->si_addr) || place->destination.holds(info->si_addr)) siglongjmp(place->back, 1);
    }
  }
  hand_on(*before.load(std::memory_order_acquire), signal, info, context);
  errno = error_number;
}

bool is_ours(const Action& action) { return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == handle; }

bool is_same(const Action& a, const Action& b) {
  if (a.sa_flags != b.sa_flags || a.sa_handler != b.sa_handler) return false;
  for (int signal = 1; signal < NSIG; ++signal) {
    if (sigismember(&a.sa_mask, signal) != sigismember(&b.sa_mask, signal)) return false;
  }
  return true;
}

Action current_action() {
  Action action{};
  ::sigaction(SIGBUS, nullptr, &action);
  return action;
}

// Ours in the place of another one: with its mask and on its stack, as it may be called from ours.
Action action_in_place_of(const Action& other) {
  Action action{};
  action.sa_sigaction = handle;
  action.sa_mask = other.sa_mask;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  if (has_handler(other)) action.sa_flags = SA_SIGINFO | (other.sa_flags & (SA_ONSTACK | SA_NODEFER | SA_RESTART));
  return action;
}

// Puts the handler in place for the first of the copies under way, and takes it away after the last.
class Handler {
 public:
  // False if somebody else has replaced it.
  bool acquire() {
    if (users_ == 0 && !taken_) taken_ = !install();
    if (users_ > 0 && !taken_) taken_ = !is_ours(current_action());
    if (taken_) return false;
    ++users_;
    return true;
  }

  void release() {
    if (--users_ > 0) return;
    if (!is_ours(current_action())) {
      taken_ = true;
      return;
    }
    Action replaced{};
    ::sigaction(SIGBUS, before.load(), &replaced);
    if (is_ours(replaced)) return;
    taken_ = true;  // between the two calls
    ::sigaction(SIGBUS, &replaced, nullptr);
  }

  // In a child, where no other thread is left to end its copy.
  void forget() {
    if (users_ == 0) return;
    users_ = 1;
    release();
  }

 private:
  bool install() {
    const Action current = current_action();
    if (is_ours(current)) return false;  // somebody kept it, and put it there again
    const Action* kept = keep(current);
    if (kept == nullptr) return false;
    before.store(kept, std::memory_order_release);
    const Action action = action_in_place_of(current);
    Action replaced{};
    ::sigaction(SIGBUS, &action, &replaced);
    if (is_same(replaced, current)) return true;
    ::sigaction(SIGBUS, &replaced, nullptr);
    return false;
  }

  // The handler may still read actions of before, so each is kept once, for ever.
  const Action* keep(const Action& action) {
    for (size_t i = 0; i < kept_count_; ++i) {
      if (is_same(kept_[i], action)) return &kept_[i];
    }
    if (kept_count_ == kept_.size()) return nullptr;
    return &(kept_[kept_count_++] = action);
  }

  size_t users_ = 0;
  bool taken_ = false;
  std::array<Action, 32> kept_{};
  size_t kept_count_ = 0;
};

std::mutex mutex;  // for the handler, and for who has which place
Handler handler;

// A fork by another thread must not leave the child a mutex that nobody unlocks, nor copies that nobody ends.
void before_fork() noexcept { mutex.lock(); }
void after_fork() noexcept { mutex.unlock(); }
void after_fork_in_child() noexcept {
  for (Place* place = places; place != nullptr; place = place->next) place->thread = 0;
  handler.forget();
  mutex.unlock();
}
[[maybe_unused]] const int registered = ::pthread_atfork(before_fork, after_fork, after_fork_in_child);

// Guards the copies of this thread, if it can.
class Guard {
 public:
  Guard(MemoryRange source, MemoryRange destination) {
    const std::scoped_lock lock(mutex);
    Place* place = free_place();
    if (!handler.acquire()) return;
    place->source = source;
    place->destination = destination;
    place->thread.store(this_thread(), std::memory_order_relaxed);
    place_ = place;
  }
  ~Guard() {
    if (place_ == nullptr) return;
    const std::scoped_lock lock(mutex);
    place_->thread.store(0, std::memory_order_relaxed);
    handler.release();
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  Place* place() const { return place_; }

 private:
  static Place* free_place() {
    for (Place* place = places; place != nullptr; place = place->next) {
      if (place->thread.load(std::memory_order_relaxed) == 0) return place;
    }
    auto* place = new Place;
    place->next = places;
    places.store(place, std::memory_order_release);
    return place;
  }

  Place* place_ = nullptr;
};

// A function of its own, with no variables that a jump back could leave in two minds.
__attribute__((noinline)) bool comes_to_its_end(const std::function<void()>& copy, sigjmp_buf& back) {
  if (sigsetjmp(back, 1) != 0) return false;  // brings back the signal mask too, as the handler has one of its own
  copy();
  return true;
}

}  // namespace

GuardedCopy copy_guarded(MemoryRange source, MemoryRange destination, const std::function<void()>& copy) {
  sigset_t blocked;
  if (::pthread_sigmask(SIG_SETMASK, nullptr, &blocked) != 0 || sigismember(&blocked, SIGBUS) != 0) {
    return GuardedCopy::kBlocked;
  }
  const Guard guard(source, destination);
  if (guard.place() == nullptr) return GuardedCopy::kTaken;
  return comes_to_its_end(copy, guard.place()->back) ? GuardedCopy::kDone : GuardedCopy::kFaulted;
}

}  // namespace dcp_fast::io
