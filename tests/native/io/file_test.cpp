#include "io/file.h"

#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
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

TEST_CASE("what is not a readable regular file is an error with path and errno, never a hang") {
  const TempDir dir;
  check_errno(dir.path("missing"), ENOENT);
  check_errno(dir.path(""), EISDIR);
  const std::string pipe = dir.path("pipe");
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  check_errno(pipe, EINVAL);
  check_errno("/dev/null", EINVAL);
  check_errno(dir.write("plain", "x") + "/below", ENOTDIR);
}

TEST_CASE("ranges are read exactly, and past the end is truncated") {
  const TempDir dir;
  const std::string bytes = Random(50).bytes(10000);
  const File file(dir.write("file", bytes));
  CHECK(file.size() == 10000);
  CHECK(read(file, 10000, 0) == bytes);
  CHECK(read(file, 100, 9900) == bytes.substr(9900));
  CHECK(read(file, 0, 10000) == "");
  struct Range {
    size_t size;
    int64_t offset;
  };
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (const Range& range : {Range{1, 10000}, Range{0, 10001}, Range{10001, 0}, Range{101, 9900}, Range{1, -1},
                             Range{1, kMost}, Range{SIZE_MAX, 0}, Range{SIZE_MAX, 5000}, Range{8, kMost - 3}}) {
    AlignedBuffer buffer;
    IoCounters counters;
    for (const bool viewed : {false, true}) {
      const auto error = error_of([&] {
        char none = 0;
        if (viewed) {
          file.view(buffer, range.size, range.offset, counters);
        } else {
          file.read_exactly(&none, range.size, range.offset, counters);
        }
      });
      REQUIRE(error.has_value());
      CHECK(error->kind == ErrorKind::kTruncated);
      CHECK(error->path == file.path());
      CHECK(error->offset == range.offset);
      CHECK(counters.requests == 0);
    }
  }
}

TEST_CASE("a file that shrinks while it is open is truncated, in every mode") {
  const TempDir dir;
  for (const IoMode mode : {IoMode::kCached, IoMode::kDirect}) {
    const File file(dir.write("file", std::string(20000, 'x')), mode);
    std::filesystem::resize_file(file.path(), 5000);
    AlignedBuffer buffer;
    IoCounters counters;
    const auto error = error_of([&] { file.view(buffer, 15000, 3000, counters); });
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kTruncated);
    CHECK(error->path == file.path());
    CHECK(error->offset == 5000);
    CHECK(error->length == 13000);
  }
}

TEST_CASE("direct reads of any range equal cached ones") {
  const TempDir dir;
  Random random(51);
  for (const size_t size : {1, 4095, 4096, 4097, 300001}) {
    const std::string bytes = random.bytes(size);
    const File file(dir.write("file", bytes), IoMode::kDirect);  // cached where the file system has no direct I/O
    AlignedBuffer buffer;
    for (int i = 0; i < 200; ++i) {
      const size_t offset = random.below(size + 1);
      const size_t length = random.below(std::min<size_t>(size - offset, random.chance(50) ? 5000 : size) + 1);
      REQUIRE(view(file, buffer, length, static_cast<int64_t>(offset)) == bytes.substr(offset, length));
    }
  }
}

TEST_CASE("the mode follows what the page cache holds") {
  const TempDir dir;
  const std::string path = dir.write("file", std::string(1 << 20, 'x'));
  const auto is_direct = [&](IoMode mode, int64_t begin, int64_t end) {
    io::File file(path, mode);
    const io::OpenSource open(file);
    file.choose_access(begin, end);
    return file.access().whole_pages;
  };
  CHECK(!is_direct(IoMode::kCached, 0, 1 << 20));
  CHECK(!is_direct(IoMode::kAuto, 0, 0));
  CHECK(!is_direct(IoMode::kAuto, 100, 101));
  CHECK(!is_direct(IoMode::kAuto, 0, 1 << 20));  // just written
  const bool direct = is_direct(IoMode::kDirect, 0, 1 << 20);
  {
    FaultySystemCalls cold(fault(FaultFunction::kPreadNowait, 0, EAGAIN, 1000));
    const ScopedCalls scope(cold);
    CHECK(is_direct(IoMode::kAuto, 0, 1 << 20) == direct);
    CHECK(cold.calls() > 4);
    CHECK(cold.calls() <= 17);
  }
  FaultySystemCalls cannot_tell(fault(FaultFunction::kPreadNowait, 0, EOPNOTSUPP, 1000));
  const ScopedCalls scope(cannot_tell);
  CHECK(!is_direct(IoMode::kAuto, 0, 1 << 20));
  CHECK(cannot_tell.calls() == 1);
}

TEST_CASE("what ranks of a node read together goes through the page cache, unless it is there") {
  const TempDir dir;
  const std::string bytes = Random(52).bytes(1 << 20);
  const std::string path = dir.write("file", bytes);
  const auto access_of = [&](IoMode mode, int64_t end = 1 << 20) {
    io::File file(path, mode, io::Readers::kRanksOfNode);
    const io::OpenSource open(file);
    file.choose_access(0, end);
    return file.access();
  };
  CHECK(access_of(IoMode::kAuto).mapped);  // just written
  CHECK(!access_of(IoMode::kAuto).shared);
  {
    FaultySystemCalls cold(fault(FaultFunction::kPreadNowait, 0, EAGAIN, 1000));
    const ScopedCalls scope(cold);
    CHECK(access_of(IoMode::kAuto).shared);
    CHECK(!access_of(IoMode::kAuto).whole_pages);
    CHECK(!access_of(IoMode::kAuto, 0).shared);
    CHECK(!access_of(IoMode::kCached).shared);
    CHECK(!access_of(IoMode::kDirect).shared);
    CHECK(!access_of(IoMode::kMapped).shared);
  }
  {
    // Another rank has begun to read it.
    FaultySystemCalls half(fault(FaultFunction::kPreadNowait, 0, EAGAIN, 4));
    const ScopedCalls scope(half);
    CHECK(access_of(IoMode::kAuto).shared);
  }
  FaultySystemCalls cannot_tell(fault(FaultFunction::kPreadNowait, 0, EOPNOTSUPP, 1000));
  const ScopedCalls scope(cannot_tell);
  CHECK(!access_of(IoMode::kAuto).shared);
}

TEST_CASE("read-ahead is asked for in steps, and not past the end of a file") {
  struct Recorder final : io::SystemCalls {
    int read_ahead(int /*fd*/, off_t offset, size_t size) override {
      asked.emplace_back(offset, offset + static_cast<int64_t>(size));
      return error_number;
    }
    std::vector<std::pair<int64_t, int64_t>> asked;
    int error_number = 0;
  };
  using Asked = std::vector<std::pair<int64_t, int64_t>>;
  constexpr int64_t kStep = 128 << 10;
  const TempDir dir;
  const File file(dir.write("file", std::string(400'000, 'x')));
  Recorder recorder;
  const ScopedCalls scope(recorder);
  file.read_ahead(2 * kStep + 1, 5);
  CHECK(recorder.asked == Asked{{5, kStep + 5}, {kStep + 5, 2 * kStep + 5}, {2 * kStep + 5, 2 * kStep + 6}});
  recorder.asked.clear();
  file.read_ahead(1 << 20, 399'000);
  file.read_ahead(1 << 20, 400'000);
  file.read_ahead(0, 0);
  CHECK(recorder.asked == Asked{{399'000, 400'000}});
  recorder.asked.clear();
  recorder.error_number = EINVAL;  // of a file system that has no read-ahead
  file.read_ahead(400'000, 0);
  CHECK(recorder.asked == Asked{{0, kStep}});
}

TEST_CASE("a bounce buffer is aligned, grows, and refuses sizes that overflow") {
  AlignedBuffer buffer;
  std::byte* small = buffer.reserve(1);
  CHECK(reinterpret_cast<uintptr_t>(small) % io::kPageBytes == 0);
  small[io::kPageBytes - 1] = std::byte{1};
  CHECK(buffer.reserve(4096) == small);
  std::byte* large = buffer.reserve((4 << 20) + 1);
  large[4 << 20] = std::byte{1};
  CHECK(buffer.reserve(1) == large);
  CHECK_THROWS_AS(buffer.reserve(SIZE_MAX), std::bad_alloc);
  CHECK_THROWS_AS(buffer.reserve(SIZE_MAX / 2), std::bad_alloc);
  buffer.reserve(1)[0] = std::byte{1};
}

TEST_CASE("a file is open while anybody has it open, and its access outlasts that") {
  const TempDir dir;
  const std::string path = dir.write("file", std::string(10000, 'x'));
  FaultySystemCalls opens(fault(FaultFunction::kOpen, -1, 0));
  const ScopedCalls scope(opens);
  io::File file(path, IoMode::kDirect);
  CHECK(opens.calls() == 0);
  {
    const io::OpenSource one(file);
    io::OpenSource two(file);
    CHECK(opens.calls() == 1);
    file.choose_access(0, file.size());
    two = {};
    CHECK(read(file, 100, 50) == std::string(100, 'x'));
  }
  if (!file.access().whole_pages) return;  // the file system has no direct I/O
  CHECK(opens.calls() == 2);
  dir.write("file", std::string(300, 'y'));
  const io::OpenSource again(file);
  CHECK(opens.calls() == 4);
  CHECK(file.size() == 300);
  AlignedBuffer buffer;
  CHECK(view(file, buffer, 200, 100) == std::string(200, 'y'));
  CHECK(error_of([&] { read(file, 301, 0); })->kind == ErrorKind::kTruncated);
}
