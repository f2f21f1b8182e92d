#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "io/file.h"
#include "io/file_reading.h"
#include "io/signals.h"
#include "random.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::FaultFunction;
using io::FaultySystemCalls;
using File = OpenFile;
using io::IoCounters;
using io::IoMode;

namespace {

// Copies a range whole, or leaves it out.
bool copy_mapped(const io::File& file, std::string& to, int64_t offset, IoCounters& counters) {
  auto* begin = reinterpret_cast<std::byte*>(to.data());
  const auto copy = [&](const std::byte* data) { std::memcpy(begin, data, to.size()); };
  io::MappedWindow window;
  return file.copy_mapped({offset, to.size(), to.size(), {begin, begin + to.size()}, copy}, window, counters);
}

// As the engine does: what cannot be copied is read.
std::optional<Error> copy_or_read(const io::File& file, std::string& to, int64_t offset, IoCounters& counters) {
  return error_of([&] {
    if (!copy_mapped(file, to, offset, counters)) file.read_exactly(to.data(), to.size(), offset, counters);
  });
}

bool is_mapped(const std::string& path, IoMode mode) {
  io::File file(path, mode);
  const io::OpenSource open(file);
  file.choose_access(0, file.size());
  return file.access().mapped;
}

// A file system of another type.
class OtherFileSystem final : public io::SystemCalls {
 public:
  explicit OtherFileSystem(int64_t type) : type_(type) {}
  int fstatfs(int /*fd*/, struct statfs* status) override {
    status->f_type = static_cast<decltype(status->f_type)>(type_);
    return 0;
  }

 private:
  int64_t type_;
};

// A device that fails: mapped pages cannot be had, and reads return an error.
class FailingDevice final : public io::SystemCalls {
 public:
  ssize_t pread(int /*fd*/, void* /*buffer*/, size_t /*size*/, off_t /*offset*/) override {
    errno = EIO;
    return -1;
  }
  void* map(int /*fd*/, size_t size, off_t /*offset*/) override {
    const int empty = ::memfd_create("empty", MFD_CLOEXEC);
    void* memory = SystemCalls::map(empty, size, 0);
    ::close(empty);
    return memory;
  }
};

}  // namespace

TEST_CASE("mapped copies of any range equal reads, and count what they copy") {
  const TempDir dir;
  Random random(70);
  const std::string bytes = random.bytes(300001);
  const File file(dir.write("file", bytes), IoMode::kMapped);
  for (int i = 0; i < 300; ++i) {
    const size_t offset = random.below(bytes.size());
    std::string to(random.below(bytes.size() - offset) + 1, '#');
    IoCounters counters;
    REQUIRE(copy_mapped(file, to, static_cast<int64_t>(offset), counters));
    REQUIRE((to == bytes.substr(offset, to.size())));
    CHECK(counters.requests == 1);
    CHECK(counters.bytes == static_cast<int64_t>(to.size()));
    CHECK(counters.mapped_bytes == counters.bytes);
    CHECK(counters.unmapped == 0);
  }
  IoCounters counters;
  std::string past(2, '#');
  const auto error = error_of([&] { copy_mapped(file, past, 300000, counters); });
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
}

TEST_CASE("a window stays where it is as long as it shows what is asked for") {
  const TempDir dir;
  Random random(76);
  const std::string bytes = random.bytes((70 << 20) + 333);
  const File file(dir.write("file", bytes), IoMode::kMapped);
  FaultySystemCalls calls(fault(FaultFunction::kMap, -1, 0));
  const ScopedCalls scope(calls);
  io::MappedWindow window;
  std::string to(100000, '#');
  auto* begin = reinterpret_cast<std::byte*>(to.data());
  const auto copy = [&](const std::byte* data) { std::memcpy(begin, data, to.size()); };
  const auto check = [&](size_t offset, int64_t mappings) {
    IoCounters counters;
    const auto at = static_cast<int64_t>(offset);
    REQUIRE(file.copy_mapped({at, to.size(), to.size(), {begin, begin + to.size()}, copy}, window, counters));
    REQUIRE(to.compare(0, to.size(), bytes, offset, to.size()) == 0);
    CHECK(calls.calls() == mappings);
  };
  for (size_t offset = 5; offset < (31 << 20); offset += 1 << 20) check(offset, 1);
  check((32 << 20) - 50000, 2);
  check((70 << 20) + 333 - 100000, 3);
  check((68 << 20) + 1, 3);
  check(0, 4);
  window.reset();
  check(0, 5);
}

TEST_CASE("files are mapped that are in the page cache of a local file system") {
  const TempDir dir;
  const std::string path = dir.write("file", std::string(1 << 20, 'x'));
  for (const int64_t local : {0xEF53L, 0x58465342L, 0x9123683EL, 0x01021994L, 0x794C7630L}) {
    OtherFileSystem calls(local);
    const ScopedCalls scope(calls);
    CHECK(is_mapped(path, IoMode::kAuto));
    CHECK(!is_mapped(path, IoMode::kCached));
    CHECK(!is_mapped(path, IoMode::kDirect));
  }
  for (const int64_t other :
       {0x6969L, 0x65735546L, 0x0BD00BD0L, 0xFE534D42L, 0x2FC12FC1L, 0L}) {  // nfs, fuse, lustre, smb, zfs
    OtherFileSystem calls(other);
    const ScopedCalls scope(calls);
    CHECK(!is_mapped(path, IoMode::kAuto));
    CHECK(is_mapped(path, IoMode::kMapped));
  }
  for (const io::Fault& unknown :
       {fault(FaultFunction::kFstatfs, 0, ENOSYS), fault(FaultFunction::kPreadNowait, 3, EAGAIN),
        fault(FaultFunction::kPreadNowait, 0, EOPNOTSUPP), fault(FaultFunction::kOpen, 1, EMFILE)}) {
    FaultySystemCalls calls(unknown);
    const ScopedCalls scope(calls);
    CHECK(!is_mapped(path, IoMode::kAuto));
  }
}

TEST_CASE("where the system refuses a mapping, bytes are read, and the reason is kept") {
  const TempDir dir;
  const std::string bytes = Random(71).bytes(100000);
  const File file(dir.write("file", bytes), IoMode::kMapped);
  for (const int number : {ENOMEM, ENODEV, EACCES, EAGAIN, EPERM}) {
    FaultySystemCalls calls(fault(FaultFunction::kMap, 0, number));
    const ScopedCalls scope(calls);
    std::string to(50000, '#');
    IoCounters counters;
    CHECK(!copy_or_read(file, to, 1234, counters));
    CHECK((to == bytes.substr(1234, 50000)));
    CHECK(counters.mapped_bytes == 0);
    CHECK(counters.bytes == 50000);
    CHECK(counters.unmapped == number);
  }
  CHECK(io::why_unmapped(ENOMEM) == "a file could not be mapped: Cannot allocate memory");
}

TEST_CASE("pages that vanish are read instead, and a device that fails is an error with its number") {
  const TempDir dir;
  const std::string bytes = Random(72).bytes(100000);
  const File file(dir.write("file", bytes), IoMode::kMapped);
  std::string to(50000, '#');
  {
    FaultySystemCalls calls(fault(FaultFunction::kMap, 0, 0));
    const ScopedCalls scope(calls);
    IoCounters counters;
    CHECK(!copy_or_read(file, to, 1234, counters));
    CHECK((to == bytes.substr(1234, 50000)));
    CHECK(counters.unmapped == io::kPagesVanished);
  }
  FailingDevice calls;
  const ScopedCalls scope(calls);
  IoCounters counters;
  const auto error = copy_or_read(file, to, 1234, counters);
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kIo);
  CHECK(error->error_number == EIO);
  CHECK(error->path == file.path());
  CHECK(error->offset == 1234);
  CHECK(error->length == 50000);
}

TEST_CASE("a destination without memory is an error, as for reads") {
  const TempDir dir;
  const File file(dir.write("file", std::string(100000, 'x')), IoMode::kMapped);
  const FilePages to(65536, 4096);
  IoCounters counters;
  const auto error = error_of([&] {
    const auto copy = [&](const std::byte* data) { std::memcpy(to.data(), data, to.size()); };
    const io::MemoryRange range{to.data(), to.data() + to.size()};
    io::MappedWindow window;
    if (!file.copy_mapped({0, to.size(), to.size(), range, copy}, window, counters)) {
      std::byte* begin = to.data() + 4096;  // a read stops at the first page that is not there
      file.read_exactly(begin, to.size() - 4096, 4096, counters);
    }
  });
  REQUIRE(error.has_value());
  CHECK(error->error_number == EFAULT);
}

TEST_CASE("a file that was cut short is truncated, also within a page, where there is no fault") {
  const TempDir dir;
  const std::string bytes = Random(73).bytes(40000);
  for (const size_t left : {0, 1, 4095, 4096, 4097, 20000, 36864, 39998, 39999}) {
    const File file(dir.write("file", bytes), IoMode::kMapped);
    std::filesystem::resize_file(file.path(), left);
    std::string to(39000, '#');
    IoCounters counters;
    const auto error = copy_or_read(file, to, 1000, counters);
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kTruncated);
    CHECK(error->path == file.path());
    CHECK(error->offset == static_cast<int64_t>(std::max<size_t>(left, 1000)));
    CHECK(error->offset + error->length == 40000);
    // What lies before the end is still there.
    if (left > 1000) {
      std::string before(left - 1000, '#');
      CHECK(copy_mapped(file, before, 1000, counters));
      CHECK((before == bytes.substr(1000, left - 1000)));
    }
  }
}

TEST_CASE("another process cuts a file short at any moment: the right bytes or an error") {
  constexpr size_t kBytes = 1 << 20;
  constexpr int kRuns = 400;
  struct Turn {
    std::atomic<int> run{-1};
    std::atomic<int> done{-1};
  };
  auto* shared =
      static_cast<Turn*>(::mmap(nullptr, sizeof(Turn), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  REQUIRE(shared != MAP_FAILED);
  const auto* turn = new (shared) Turn;
  const TempDir dir;
  const std::string bytes = Random(74).bytes(kBytes);
  const std::string path = dir.write("file", bytes);
  const pid_t child = ::fork();
  if (child == 0) {
    Random random(75);
    for (int run = 0; run < kRuns; ++run) {
      while (shared->run < run) ::usleep(0);
      for (volatile int64_t spin = random.between(0, 300000); spin > 0;) spin = spin - 1;
      if (::truncate(path.c_str(), random.between(0, kBytes - 1)) != 0) ::_exit(1);
      shared->done = run;
    }
    ::_exit(0);
  }
  int errors = 0;
  int copied = 0;
  for (int run = 0; run < kRuns; ++run) {
    dir.write("file", bytes);
    const File file(path, IoMode::kMapped);
    std::string to(kBytes, '#');
    IoCounters counters;
    shared->run = run;
    while (turn->done < run) {
      to.assign(kBytes, '#');
      const auto error = copy_or_read(file, to, 0, counters);
      if (!error) {
        REQUIRE((to == bytes));
        ++copied;
        continue;
      }
      ++errors;
      REQUIRE(error->kind == ErrorKind::kTruncated);
      REQUIRE(error->path == path);
      REQUIRE(error->offset + error->length == kBytes);
      break;
    }
    while (turn->done < run) ::usleep(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(status == 0);
  CHECK(errors > kRuns / 20);
  CHECK(copied > 0);
  ::munmap(shared, sizeof(Turn));
}
