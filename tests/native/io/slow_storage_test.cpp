#include "io/slow_storage.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <functional>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "doctest/doctest.h"
#include "faults.h"
#include "io/file_reading.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::SlowStorage;

namespace {

constexpr double kNoLimit = 1e15;  // bytes per second

double seconds_of(const std::function<void()>& work) {
  const auto begin = SlowStorage::Clock::now();
  work();
  return std::chrono::duration<double>(SlowStorage::Clock::now() - begin).count();
}

void in_threads(int count, const std::function<void()>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
}

// A process of its own, which the destructor waits for.
class Child {
 public:
  explicit Child(const std::function<void()>& work) : id_(::fork()) {
    if (id_ != 0) return;
    work();
    ::_exit(0);
  }
  ~Child() { ::waitpid(id_, nullptr, 0); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  void kill() const { ::kill(id_, SIGKILL); }

 private:
  const pid_t id_;
};

}  // namespace

TEST_CASE("slow storage: processes share the bandwidth, and what all were given is counted") {
  const TempDir dir;
  const std::string path = dir.path("storage");
  SlowStorage storage(path, 1e7, 0);
  const double seconds = seconds_of([&] {
    const auto take = [&] {
      SlowStorage of_process(path, 1e7, 0);
      for (int i = 0; i < 10; ++i) of_process.take(100'000);
    };
    const Child first(take);
    const Child second(take);
    take();
  });
  CHECK(seconds >= 0.3);
  CHECK(seconds < 3);
  CHECK(storage.bytes() == 3'000'000);
  CHECK(storage.requests() == 30);
}

TEST_CASE("slow storage: a process that is killed holds nobody up longer than its own turns") {
  const TempDir dir;
  const std::string path = dir.path("storage");
  SlowStorage storage(path, 1e7, 0);
  {
    const Child child([&] {
      SlowStorage of_child(path, 1e7, 0);
      for (;;) of_child.take(100'000);
    });
    while (storage.requests() < 3) ::usleep(1000);
    child.kill();
  }
  CHECK(seconds_of([&] { storage.take(100'000); }) < 1);
}

TEST_CASE("slow storage: threads wait for their latencies side by side, but for the bandwidth in turn") {
  const TempDir dir;
  SlowStorage latent(dir.path("latent"), kNoLimit, 0.1);
  const double side_by_side = seconds_of([&] { in_threads(8, [&] { latent.take(1 << 20); }); });
  CHECK(side_by_side >= 0.1);
  CHECK(side_by_side < 0.7);
  SlowStorage narrow(dir.path("narrow"), 1e7, 0);
  CHECK(seconds_of([&] { in_threads(8, [&] { narrow.take(200'000); }); }) >= 0.16);
}

TEST_CASE("slow storage: time in which nobody reads is not saved up") {
  const TempDir dir;
  SlowStorage storage(dir.path("storage"), 1e7, 0);
  storage.take(1);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK(seconds_of([&] { storage.take(1'000'000); }) >= 0.1);
}

TEST_CASE("slow storage: the engine takes its files for those of a network") {
  const TempDir dir;
  const std::string bytes(100'000, 'x');
  const std::string path = dir.write("file", bytes);
  SlowStorage storage(dir.path("storage"), kNoLimit, 0);
  const ScopedCalls scope(storage);
  const OpenFile file(path, io::IoMode::kAuto);
  CHECK(!file.access().mapped);
  CHECK(!file.is_direct());
  CHECK(read(file, bytes.size(), 0) == bytes);
  CHECK(storage.bytes() == 100'000);
  CHECK(storage.requests() == 1);

  std::string first(10, '?');
  std::string second(90, '?');
  std::vector<iovec> vectors{{first.data(), first.size()}, {second.data(), second.size()}};
  io::IoCounters counters;
  file.read_scattered(vectors, 0, counters);
  CHECK(storage.bytes() == 100'100);
  CHECK(storage.requests() == 2);

  io::MappedWindow window;
  std::string destination(bytes.size(), '?');
  const auto* memory = reinterpret_cast<const std::byte*>(destination.data());
  const io::MappedCopy copy{0, bytes.size(), bytes.size(), {memory, memory + bytes.size()}, [](const std::byte*) {}};
  CHECK(!file.copy_mapped(copy, window, counters));
  CHECK(counters.unmapped == ENODEV);
}

TEST_CASE("slow storage: what lies past the end of a file costs nothing, and errors are passed on") {
  const TempDir dir;
  const std::string path = dir.write("file", "12345");
  SlowStorage storage(dir.path("storage"), kNoLimit, 0);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  REQUIRE(fd >= 0);
  std::array<char, 100> buffer{};
  CHECK(storage.pread(fd, buffer.data(), buffer.size(), 2) == 3);
  CHECK(storage.bytes() == 3);
  ::close(fd);
  errno = 0;
  CHECK(storage.pread(-1, buffer.data(), buffer.size(), 0) == -1);
  CHECK(errno == EBADF);
  CHECK(storage.requests() == 1);
}

TEST_CASE("slow storage: impossible storage is refused") {
  const TempDir dir;
  const std::string path = dir.path("storage");
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const double bandwidth : {0.0, -1.0, kNan}) {
    CHECK_THROWS_AS(SlowStorage(path, bandwidth, 0), std::invalid_argument);
  }
  for (const double latency : {-1.0, kNan}) CHECK_THROWS_AS(SlowStorage(path, 1, latency), std::invalid_argument);
  CHECK_THROWS_AS(SlowStorage(dir.path("missing") + "/storage", 1, 0), std::system_error);
}
