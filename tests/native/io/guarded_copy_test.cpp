#include "io/guarded_copy.h"

#include <pthread.h>
#include <sys/syscall.h>

#include <atomic>
#include <csetjmp>
#include <string>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "io/signals.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::copy_guarded;
using io::GuardedCopy;
using io::MemoryRange;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kSize = 16 * kPage;

// What handlers of the tests saw.
std::atomic<int> calls{0};
std::atomic<int> last_code{0};
std::atomic<void*> last_address{nullptr};
thread_local sigjmp_buf* way_out = nullptr;

void count(int /*signal*/) { ++calls; }

void count_info(int /*signal*/, siginfo_t* info, void* /*context*/) {
  ++calls;
  last_code = info->si_code;
  last_address = info->si_addr;
  if (info->si_code > 0) siglongjmp(*way_out, 1);
}

MemoryRange range_of(const std::string& memory) {
  const auto* begin = reinterpret_cast<const std::byte*>(memory.data());
  return {begin, begin + memory.size()};
}
MemoryRange range_of(const FilePages& pages) { return {pages.data(), pages.data() + pages.size()}; }

GuardedCopy copy_pages(const FilePages& from, std::string& to) {
  return copy_guarded(range_of(from), range_of(to), [&] { std::memcpy(to.data(), from.data(), from.size()); });
}

// Touches a page of somebody else's that is not there. True if the handler that was there before got the signal.
bool foreign_fault_is_handed_on() {
  const FilePages foreign(kPage);
  const int before = calls;
  sigjmp_buf back;
  way_out = &back;
  if (sigsetjmp(back, 1) == 0) {
    touch(foreign.data() + 100);
    return false;
  }
  return calls == before + 1 && last_address == foreign.data() + 100;
}

// With the default action, whatever a sanitizer has set.
int with_default_action(const std::function<int()>& body) {
  return in_child([&] {
    const ScopedAction scope(SIG_DFL);
    return body();
  });
}

}  // namespace

TEST_CASE("guarded copy: what is there is copied, and what is not ends the copy") {
  const FilePages pages(kSize, kSize);
  std::memset(pages.data(), 'x', kSize);
  std::string to(kSize, '#');
  CHECK(copy_pages(pages, to) == GuardedCopy::kDone);
  CHECK((to == std::string(kSize, 'x')));
  pages.resize(kSize / 2);
  for (int i = 0; i < 100; ++i) CHECK(copy_pages(pages, to) == GuardedCopy::kFaulted);
  pages.resize(kSize);
  CHECK(copy_pages(pages, to) == GuardedCopy::kDone);
}

TEST_CASE("guarded copy: a destination that has no pages ends it as well") {
  const FilePages to(kSize, kPage);
  const std::string from(kSize, 'x');
  const auto copy = [&] { std::memcpy(to.data(), from.data(), kSize); };
  CHECK(copy_guarded(range_of(from), range_of(to), copy) == GuardedCopy::kFaulted);
}

TEST_CASE("guarded copy: afterwards SIGBUS does what it did before") {
  const FilePages pages(kSize);
  std::string to(kSize, '#');
  Action handler{};
  handler.sa_sigaction = count_info;
  handler.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK | SA_RESTART;
  sigaddset(&handler.sa_mask, SIGUSR2);
  Action plain{};
  plain.sa_handler = count;
  Action ignored{};
  ignored.sa_handler = SIG_IGN;
  for (const Action& action : {handler, plain, ignored, Action{}}) {
    const ScopedAction scope(action);
    const Action before = action_of_sigbus();
    Action within{};
    const auto copy = [&] {
      within = action_of_sigbus();
      touch(pages.data());
    };
    CHECK(copy_guarded(range_of(pages), range_of(to), copy) == GuardedCopy::kFaulted);
    CHECK(!is_same(within, before));
    CHECK(is_same(action_of_sigbus(), before));
    sigset_t mask;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    CHECK(sigismember(&mask, SIGBUS) == 0);
    CHECK(sigismember(&mask, SIGUSR2) == 0);
  }
}

TEST_CASE("guarded copy: signals that are sent meanwhile go to whoever was there before") {
  const std::string from(100, 'x');
  std::string to(100, '#');
  const auto send = [&] {
    ::kill(::getpid(), SIGBUS);
    std::memcpy(to.data(), from.data(), from.size());
  };
  for (const int flags : {0, SA_NODEFER, SA_RESTART | SA_ONSTACK}) {
    to.assign(100, '#');
    calls = 0;
    const ScopedAction scope(count, flags);
    CHECK(copy_guarded(range_of(from), range_of(to), send) == GuardedCopy::kDone);
    CHECK(calls == 1);
    CHECK(to == from);
  }
  {
    const ScopedAction scope(count_info);
    CHECK(copy_guarded(range_of(from), range_of(to), send) == GuardedCopy::kDone);
    CHECK(calls == 2);
    CHECK(last_code == SI_USER);
  }
  for (const int flags : {0, SA_SIGINFO}) {
    const ScopedAction ignored(SIG_IGN, flags);
    CHECK(copy_guarded(range_of(from), range_of(to), send) == GuardedCopy::kDone);
    CHECK(calls == 2);
  }
}

TEST_CASE("guarded copy: a handler that is to be called once is called once") {
  const std::string from(100, 'x');
  std::string to(100, '#');
  calls = 0;
  CHECK(in_child([&] {
          const ScopedAction scope(count, SA_RESETHAND);
          const auto send = [] { ::raise(SIGBUS); };
          if (copy_guarded(range_of(from), range_of(to), send) != GuardedCopy::kDone || calls != 1) return 1;
          return action_of_sigbus().sa_handler == SIG_DFL ? 0 : 2;
        }) == 0);
}

TEST_CASE("guarded copy: faults elsewhere go to whoever was there before, on any thread") {
  const FilePages pages(kSize, kSize);
  std::string to(kSize, '#');
  const ScopedAction scope(count_info);
  bool handed_on = false;
  CHECK(copy_guarded(range_of(pages), range_of(to), [&] { handed_on = foreign_fault_is_handed_on(); }) ==
        GuardedCopy::kDone);
  CHECK(handed_on);
  handed_on = false;
  const auto elsewhere = [&] { std::thread([&] { handed_on = foreign_fault_is_handed_on(); }).join(); };
  CHECK(copy_guarded(range_of(pages), range_of(to), elsewhere) == GuardedCopy::kDone);
  CHECK(handed_on);
  // An address of the copy, touched by a thread that is not the one which copies.
  handed_on = false;
  pages.resize(0);
  const auto same_address = [&] {
    std::thread([&] {
      sigjmp_buf back;
      way_out = &back;
      if (sigsetjmp(back, 1) == 0) {
        touch(pages.data());
      } else {
        handed_on = true;
      }
    }).join();
  };
  CHECK(copy_guarded(range_of(pages), range_of(to), same_address) == GuardedCopy::kDone);
  CHECK(handed_on);
}

TEST_CASE("guarded copy: what ends a process without it ends it with it") {
  const FilePages foreign(kPage);
  const std::string from(100, 'x');
  std::string to(100, '#');
  const auto copy_while = [&](const std::function<void()>& body) {
    return with_default_action([&] {
      copy_guarded(range_of(from), range_of(to), body);
      return 0;
    });
  };
  CHECK(copy_while([] {}) == 0);
  CHECK(copy_while([&] { touch(foreign.data()); }) == -SIGBUS);
  CHECK(copy_while([] { ::kill(::getpid(), SIGBUS); }) == -SIGBUS);
  CHECK(copy_while([&] { std::thread([&] { touch(foreign.data()); }).join(); }) == -SIGBUS);
  CHECK(in_child([&] {
          const ScopedAction ignored(SIG_IGN);  // which holds for no fault
          copy_guarded(range_of(from), range_of(to), [&] { touch(foreign.data()); });
          return 0;
        }) == -SIGBUS);
}

TEST_CASE("guarded copy: a thread that blocks SIGBUS gets none") {
  const std::string from(100, 'x');
  std::string to(100, '#');
  sigset_t bus;
  sigemptyset(&bus);
  sigaddset(&bus, SIGBUS);
  ::pthread_sigmask(SIG_BLOCK, &bus, nullptr);
  bool called = false;
  CHECK(copy_guarded(range_of(from), range_of(to), [&] { called = true; }) == GuardedCopy::kBlocked);
  ::pthread_sigmask(SIG_UNBLOCK, &bus, nullptr);
  CHECK(!called);
}

TEST_CASE("guarded copy: whoever replaces the handler meanwhile stays, and may call ours") {
  static Action kept{};
  const FilePages pages(kSize);
  std::string to(kSize, '#');
  // Like Python's faulthandler: it puts back what it found, and lets that have the signal.
  const auto theirs = [](int signal) {
    ++calls;
    ::sigaction(SIGBUS, &kept, nullptr);
    ::raise(signal);
  };
  const auto replace = [&] {
    Action action{};
    action.sa_handler = theirs;
    action.sa_flags = SA_NODEFER;
    ::sigaction(SIGBUS, &action, &kept);
  };
  const int code = in_child([&] {
    const ScopedAction scope(count);
    calls = 0;
    if (copy_guarded(range_of(pages), range_of(to), replace) != GuardedCopy::kDone) return 1;
    if (action_of_sigbus().sa_handler != static_cast<void (*)(int)>(theirs)) return 2;
    if (copy_pages(pages, to) != GuardedCopy::kTaken) return 3;
    ::raise(SIGBUS);  // theirs, then ours, then the one of before
    if (calls != 2) return 4;
    if (copy_pages(pages, to) != GuardedCopy::kTaken) return 5;
    ::raise(SIGBUS);  // ours, as they put it back
    return calls == 3 ? 0 : 6;
  });
  CHECK(code == 0);
  // The same while another copy goes on: it is noticed before anything is copied.
  CHECK(in_child([&] {
          GuardedCopy second = GuardedCopy::kDone;
          const auto copy = [&] {
            replace();
            second = copy_pages(pages, to);
          };
          copy_guarded(range_of(to), range_of(to), copy);
          return second == GuardedCopy::kTaken ? 0 : 1;
        }) == 0);
}

TEST_CASE("guarded copy: a child begins without copies, and can make some") {
  const FilePages pages(kSize, kPage);
  std::string to(kSize, '#');
  const ScopedAction scope(count);
  const Action before = action_of_sigbus();
  const auto child = [&] {
    if (!is_same(action_of_sigbus(), before)) return 1;
    if (copy_pages(pages, to) != GuardedCopy::kFaulted) return 2;
    return is_same(action_of_sigbus(), before) ? 0 : 3;
  };
  int code = -1;
  CHECK(copy_guarded(range_of(to), range_of(to), [&] { code = in_child(child); }) == GuardedCopy::kDone);
  CHECK(code == 0);
  // While other threads begin and end copies all the time.
  std::atomic<bool> stop{false};
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      std::string mine(kSize, '#');
      while (!stop) failures += copy_pages(pages, mine) == GuardedCopy::kFaulted ? 0 : 1;
    });
  }
  for (int i = 0; i < 50; ++i) CHECK(in_child(child) == 0);
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(is_same(action_of_sigbus(), before));
}

TEST_CASE("guarded copy: many threads at once, some of whose pages are not there") {
  const ScopedAction scope(count);
  const Action before = action_of_sigbus();
  calls = 0;
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    threads.emplace_back([seed, &failures] {
      Random random(seed);
      std::string to(kSize, '#');
      for (int i = 0; i < 300; ++i) {
        const size_t there = random.chance(50) ? kSize : random.below(kSize / kPage) * kPage;
        const FilePages pages(kSize, there);
        std::memset(pages.data(), 'a' + static_cast<int>(i % 20), there);
        const GuardedCopy result = copy_pages(pages, to);
        const bool is_right =
            there < kSize ? result == GuardedCopy::kFaulted
                          : result == GuardedCopy::kDone && to == std::string(kSize, static_cast<char>('a' + i % 20));
        failures += is_right ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(calls == 0);
  CHECK(is_same(action_of_sigbus(), before));
}
