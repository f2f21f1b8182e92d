#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "io/file.h"
#include "io/file_reading.h"
#include "random.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::AlignedBuffer;
using io::FaultFunction;
using io::FaultySystemCalls;
using File = OpenFile;
using io::IoCounters;
using io::IoMode;

TEST_CASE("scattered reads put consecutive bytes in their places, whatever the kernel returns") {
  const TempDir dir;
  Random random(55);
  const std::string bytes = random.bytes(30000);
  const File file(dir.write("file", bytes));
  for (int i = 0; i < 300; ++i) {
    // More parts than one call takes, sometimes, and short or interrupted calls in between.
    std::vector<size_t> sizes(random.chance(5) ? 2500 : random.below(20) + 1);
    size_t total = 0;
    for (size_t& size : sizes) total += size = random.below(sizes.size() > 100 ? 9 : 1000) + 1;
    const size_t offset = random.below(bytes.size() - total + 1);
    std::string memory(2 * total, '#');
    std::string expected = memory;
    std::vector<iovec> vectors;
    size_t from = offset;
    size_t to = 0;
    for (const size_t size : sizes) {
      vectors.push_back({&memory[to], size});
      expected.replace(to, size, bytes, from, size);
      from += size;
      to += random.chance(50) ? size : 2 * size;
    }
    FaultySystemCalls calls(fault(FaultFunction::kPread, random.between(0, 3), random.chance(50) ? EINTR : 0,
                                  random.between(0, 5), random.below(1500) + 1));
    const ScopedCalls scope(calls);
    IoCounters counters;
    file.read_scattered(vectors, static_cast<int64_t>(offset), counters);
    REQUIRE((memory == expected));
    REQUIRE(counters.bytes == static_cast<int64_t>(total));
  }
  char byte = 0;
  IoCounters counters;
  std::vector<iovec> past = {{&byte, 1}, {&byte, 1}};
  const auto error = error_of([&] { file.read_scattered(past, 29999, counters); });
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
  CHECK(error->length == 2);
}

TEST_CASE("without direct I/O the page cache serves") {
  const TempDir dir;
  const std::string bytes = Random(52).bytes(50000);
  const std::string path = dir.write("file", bytes);
  {
    FaultySystemCalls refuse_open(fault(FaultFunction::kOpen, 1, EINVAL, 100));
    const ScopedCalls scope(refuse_open);
    const File file(path, IoMode::kDirect);
    CHECK(!file.is_direct());
    AlignedBuffer buffer;
    CHECK(view(file, buffer, 20000, 777) == bytes.substr(777, 20000));
  }
  const File file(path, IoMode::kDirect);
  if (!file.is_direct()) return;
  FaultySystemCalls refuse_read(fault(FaultFunction::kPread, 0, EINVAL));
  const ScopedCalls scope(refuse_read);
  AlignedBuffer buffer;
  CHECK(view(file, buffer, 20000, 777) == bytes.substr(777, 20000));
  CHECK(refuse_read.calls() == 2);
}

TEST_CASE("interrupted and short reads are continued") {
  const TempDir dir;
  const std::string bytes = Random(53).bytes(40000);
  const std::string path = dir.write("file", bytes);
  for (const IoMode mode : {IoMode::kCached, IoMode::kDirect}) {
    for (const size_t short_bytes : {size_t{1}, size_t{511}, size_t{4096}, size_t{12288}}) {
      for (int64_t nth = 0; nth < 4; ++nth) {
        for (const int error_number : {0, EINTR}) {
          const File file(path, mode);
          FaultySystemCalls calls(fault(FaultFunction::kPread, nth, error_number, 3, short_bytes));
          const ScopedCalls scope(calls);
          AlignedBuffer buffer;
          REQUIRE(view(file, buffer, 30001, 5003) == bytes.substr(5003, 30001));
          REQUIRE(read(file, 30001, 5003) == bytes.substr(5003, 30001));
        }
      }
    }
  }
  FaultySystemCalls calls(fault(FaultFunction::kOpen, 0, EINTR, 5));
  const ScopedCalls scope(calls);
  CHECK(File(path).size() == 40000);
  CHECK(calls.calls() == 6);
}

TEST_CASE("a failing read is an error with errno and range, at whichever call it comes") {
  const TempDir dir;
  const std::string path = dir.write("file", Random(54).bytes(40000));
  for (const IoMode mode : {IoMode::kCached, IoMode::kDirect}) {
    // Short reads make several calls of one; then each of them fails.
    class Calls final : public io::SystemCalls {
     public:
      explicit Calls(int failing) : failing_(failing) {}
      ssize_t pread(int fd, void* buffer, size_t size, off_t offset) override {
        if (calls++ == failing_) {
          errno = EIO;
          return -1;
        }
        return SystemCalls::pread(fd, buffer, std::min<size_t>(size, 4096), offset);
      }
      int calls = 0;

     private:
      int failing_;
    };
    int failing = 0;
    for (bool failed = true; failed; ++failing) {
      REQUIRE(failing < 100);
      const File file(path, mode);
      Calls calls(failing);
      const ScopedCalls scope(calls);
      AlignedBuffer buffer;
      IoCounters counters;
      const auto error = error_of([&] { file.view(buffer, 30000, 4096, counters); });
      failed = error.has_value();
      if (!failed) continue;
      CHECK(error->kind == ErrorKind::kIo);
      CHECK(error->error_number == EIO);
      CHECK(error->path == path);
      CHECK(error->offset == 4096 + 4096 * failing);
      CHECK(calls.calls == failing + 1);
    }
    CHECK(failing >= 8);
  }
}

TEST_CASE("failing open and fstat are errors, a failing close is not") {
  const TempDir dir;
  const std::string path = dir.write("file", "0123456789");
  for (const FaultFunction function : {FaultFunction::kOpen, FaultFunction::kFstat}) {
    FaultySystemCalls calls(fault(function, 0, EIO));
    const ScopedCalls scope(calls);
    check_errno(path, EIO);
  }
  FaultySystemCalls calls(fault(FaultFunction::kClose, 0, EIO));
  const ScopedCalls scope(calls);
  CHECK(read(File(path), 10, 0) == "0123456789");
  CHECK(calls.calls() == 1);
}

TEST_CASE("descriptors are closed, also after errors") {
  const TempDir dir;
  const std::string path = dir.write("file", std::string(100000, 'x'));
  const auto open_files = [] {
    size_t count = 0;
    for (const auto& each : std::filesystem::directory_iterator("/proc/self/fd")) count += each.exists() ? 1 : 1;
    return count;
  };
  const size_t before = open_files();
  for (int i = 0; i < 10; ++i) {
    {
      const File probed(path, IoMode::kAuto);
      const File direct(path, IoMode::kDirect);
    }
    CHECK(error_of([&] { File file(dir.path("")); }).has_value());
    FaultySystemCalls calls(fault(FaultFunction::kFstat, 0, EIO));
    const ScopedCalls scope(calls);
    CHECK(error_of([&] { File file(path); }).has_value());
  }
  CHECK(open_files() == before);
}
