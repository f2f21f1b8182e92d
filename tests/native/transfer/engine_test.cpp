#include "transfer/engine.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "checkpoint_files.h"
#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"
#include "transfer/launched.h"
#include "transfer/random_load.h"
#include "transfer/workers.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::IoMode;
using transfer::Destination;
using transfer::Item;
using transfer::Layouts;
using transfer::Options;
using transfer::Program;
using Kind = transfer::Transfer::Kind;

namespace {

// A matrix of many blocks, and its columns wanted: some hundred requests.
struct Columns {
  Columns() : files(1) {
    Random random(101);
    files.add_random(random, 0, 0, {256, 8192}, true);
    files.write();
    memory.assign(256 * 4096 * 4, '#');
    Destination destination;
    destination.data = data_of(memory);
    destination.device = transfer::kHost;
    destination.sizes = {256, 4096};
    destination.strides = {4096, 1};
    destination.dtype = 0;
    destinations.push_back(destination);
    Item item;
    item.lengths = {256, 4096};
    item.storage_offsets = {0, 1024};
    item.destination_offsets = {0, 0};
    items.push_back(item);
    options.threads = 2;
    options.block_bytes = 1;
  }
  // Makes the destination one that is converted to.
  void convert() { destinations[0].dtype = checkpoint::dtype_by_name("float16"); }

  CheckpointFiles files;
  std::string memory;
  std::vector<Destination> destinations;
  std::vector<Item> items;
  Options options;
};

std::optional<Error> error_of(const Program& program, const Options& options) {
  try {
    transfer::run_wave(program, 0, options, {}, never);
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

}  // namespace

TEST_CASE("any boxes, layouts, threads, blocks and modes give what an element-wise load gives") {
  Random random(100);
  size_t direct = 0;
  size_t waves = 0;
  int64_t converted = 0;
  for (int i = 0; i < 600; ++i) {
    CAPTURE(i);
    RandomLoad load(random, 1, i >= 300);
    std::string memory = load.before[0];
    load.place(0, data_of(memory));
    const Options options = random_options(random);
    const Layouts layouts = load.files.layouts(options, random_mode(random));
    const Program program(layouts, load.items, load.destinations);
    int64_t placed = 0;
    for (int32_t wave = 0; wave < program.waves(); ++wave) {
      const transfer::Stats stats = transfer::run_wave(program, wave, options, {}, never);
      REQUIRE(stats.bytes_read >= stats.bytes_placed);
      placed += stats.bytes_placed;
      converted += stats.converted_items;
      for (size_t item = 0; item < load.items.size(); ++item) {
        const transfer::Transfer& transfer = program.transfers()[item];
        if (transfer.wave != wave) continue;
        direct += transfer.kind == Kind::kDirect ? 1 : 0;
        if (transfer.kind != Kind::kDirect) {  // torch's part
          copy_item(load.files, program.items()[item], load.destinations[load.items[item].destination]);
        }
      }
    }
    waves += static_cast<size_t>(program.waves());
    REQUIRE(placed <= program.bytes_needed());
    REQUIRE(memory == load.expected[0]);
  }
  CHECK(direct > 800);
  CHECK(waves > 500);
  CHECK(converted > 100);
}

TEST_CASE("ranks of a node that read together load what each would load alone") {
  Random random(102);
  size_t shared = 0;
  for (int i = 0; i < 200; ++i) {
    CAPTURE(i);
    RandomLoad load(random, 1, i >= 100);
    const std::string rank = std::to_string(random.below(8));
    const Launched launched("8", rank.c_str());
    // As if none of it was in the page cache.
    io::FaultySystemCalls cold(fault(io::FaultFunction::kPreadNowait, 0, EAGAIN, 1 << 20));
    const ScopedCalls scope(cold);
    std::string memory = load.before[0];
    load.place(0, data_of(memory));
    const Options options = random_options(random);
    const Layouts layouts = load.files.layouts(options, IoMode::kAuto, io::Readers::kRanksOfNode);
    shared += static_cast<size_t>(layouts.shared_files());
    const Program program(layouts, load.items, load.destinations);
    for (int32_t wave = 0; wave < program.waves(); ++wave) {
      transfer::run_wave(program, wave, options, {}, never);
      for (size_t item = 0; item < load.items.size(); ++item) {
        const transfer::Transfer& transfer = program.transfers()[item];
        if (transfer.wave != wave || transfer.kind == Kind::kDirect) continue;  // the rest is torch's part
        copy_item(load.files, program.items()[item], load.destinations[load.items[item].destination]);
      }
    }
    REQUIRE(memory == load.expected[0]);
  }
  CHECK(shared > 100);
}

TEST_CASE("a rank of several brings whole rows into the page cache, from a place of its own on") {
  struct Recorder final : io::SystemCalls {
    ssize_t pread_nowait(int /*fd*/, void* /*buffer*/, size_t /*size*/, off_t /*offset*/) override {
      errno = EAGAIN;
      return -1;
    }
    int read_ahead(int /*fd*/, off_t offset, size_t size) override {
      if (end != offset) begins.push_back(offset);
      end = offset + static_cast<int64_t>(size);
      bytes += static_cast<int64_t>(size);
      return 0;
    }
    std::vector<int64_t> begins;  // of what comes without a gap
    int64_t end = -1;
    int64_t bytes = 0;
  };
  Columns columns;
  columns.options.threads = 1;
  const int64_t row = int64_t{8192} * 4;
  const int64_t matrix = 256 * row;
  for (const int rank : {0, 1, 3}) {
    CAPTURE(rank);
    const Launched launched("4", std::to_string(rank).c_str());
    Recorder recorder;
    const ScopedCalls scope(recorder);
    const Layouts layouts = columns.files.layouts(columns.options, IoMode::kAuto, io::Readers::kRanksOfNode);
    REQUIRE(layouts.shared_files() == 1);
    const Program program(layouts, columns.items, columns.destinations);
    transfer::run_wave(program, 0, columns.options, {}, never);
    REQUIRE(!recorder.begins.empty());
    CHECK(recorder.begins.front() >= rank * matrix / 4);
    CHECK(recorder.begins.front() < rank * matrix / 4 + matrix / 8);
    // A task has two rows here, of whose first all is brought from where the wanted half begins.
    CHECK(recorder.bytes > matrix * 7 / 10);
  }
}

TEST_CASE("blocks of the smallest size still read little more than they need") {
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options, IoMode::kCached);
  const Program program(layouts, columns.items, columns.destinations);
  const transfer::Stats stats = transfer::run_wave(program, 0, columns.options, {}, never);
  CHECK(stats.bytes_placed == 256 * 4096 * 4);
  CHECK(stats.bytes_placed == program.bytes_needed());
  CHECK(stats.bytes_read == stats.bytes_placed);  // rows of 16 KiB are read one by one, straight into place
  CHECK(stats.requests == 256);
}

TEST_CASE("every failing read is an error with item, record, path and errno, and cancels the rest") {
  Columns columns;
  columns.options.threads = 1;  // how far others come until they hear of an error is up to the system
  const Layouts layouts = columns.files.layouts(columns.options, IoMode::kCached);
  const Program program(layouts, columns.items, columns.destinations);
  for (const IoMode mode : {IoMode::kCached, IoMode::kDirect}) {
    const Options& options = columns.options;
    const Layouts in_mode = columns.files.layouts(options, mode);
    const Program in_mode_program(in_mode, columns.items, columns.destinations);
    for (const io::FaultFunction function : {io::FaultFunction::kOpen, io::FaultFunction::kPread}) {
      for (const int64_t nth : {0, 1, 7, 100}) {
        io::FaultySystemCalls calls(fault(function, nth, EIO));
        const ScopedCalls scope(calls);
        const auto error = error_of(in_mode_program, options);
        // The second open may be that of the direct descriptor, for which the page cache stands in.
        if (function == io::FaultFunction::kOpen && nth > 0) continue;
        REQUIRE(error.has_value() == (calls.calls() > nth));
        if (!error) continue;
        CHECK(error->kind == ErrorKind::kIo);
        CHECK(error->error_number == EIO);
        CHECK(error->item == 0);
        CHECK(error->record == 0);
        CHECK(error->path == columns.files.paths[0]);
        if (mode == IoMode::kCached) CHECK(calls.calls() == nth + 1);
      }
    }
  }
  io::FaultySystemCalls ends(fault(io::FaultFunction::kPread, 5, 0, 1, 0));
  const ScopedCalls scope(ends);
  const auto error = error_of(program, columns.options);
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
}

TEST_CASE("a failing read of boxes that are converted is the same error") {
  for (const IoMode mode : {IoMode::kCached, IoMode::kDirect}) {
    Columns columns;
    columns.convert();
    const Layouts layouts = columns.files.layouts(columns.options, mode);
    const Program program(layouts, columns.items, columns.destinations);
    for (const int64_t nth : {0, 7, 20}) {
      io::FaultySystemCalls calls(fault(io::FaultFunction::kPread, nth, EIO));
      const ScopedCalls scope(calls);
      const auto error = error_of(program, columns.options);
      REQUIRE(error.has_value());
      CHECK(error->kind == ErrorKind::kIo);
      CHECK(error->error_number == EIO);
      CHECK(error->item == 0);
      CHECK(error->record == 0);
      CHECK(error->path == columns.files.paths[0]);
    }
    io::FaultySystemCalls ends(fault(io::FaultFunction::kPread, 5, 0, 1, 0));
    const ScopedCalls scope(ends);
    const auto error = error_of(program, columns.options);
    // Where a direct read ends, the page cache is asked.
    REQUIRE(error.has_value() == (mode == IoMode::kCached));
    if (error) CHECK(error->kind == ErrorKind::kTruncated);
  }
}

TEST_CASE("short and interrupted reads change nothing") {
  for (const int error_number : {0, EINTR, -1}) {
    Columns columns;
    if (error_number == -1) columns.convert();
    const Layouts layouts = columns.files.layouts(columns.options, IoMode::kCached);
    const Program program(layouts, columns.items, columns.destinations);
    io::FaultySystemCalls calls(fault(io::FaultFunction::kPread, 0, std::max(error_number, 0), 100, 3));
    const ScopedCalls scope(calls);
    transfer::run_wave(program, 0, columns.options, {}, never);
    std::string expected(columns.memory.size(), '#');
    Destination destination = columns.destinations[0];
    destination.data = data_of(expected);
    copy_item(columns.files, columns.items[0], destination);
    CHECK((columns.memory == expected));
  }
}

TEST_CASE("a file that was cut between layout and load is truncated") {
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options, IoMode::kCached);
  const Program program(layouts, columns.items, columns.destinations);
  std::filesystem::resize_file(columns.files.paths[0], 5000000);
  const auto error = error_of(program, columns.options);
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
  CHECK(error->item == 0);
  CHECK(error->path == columns.files.paths[0]);
}

TEST_CASE("memory that a task cannot have is an error with item, record, path and range") {
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options, IoMode::kCached);
  const Program program(layouts, columns.items, columns.destinations);
  const auto check = [&](io::SystemCalls& calls) {
    const ScopedCalls scope(calls);
    const auto error = error_of(program, columns.options);
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kIo);
    CHECK(error->error_number == ENOMEM);
    CHECK(error->item == 0);
    CHECK(error->record == 0);
    CHECK(error->path == columns.files.paths[0]);
    CHECK(error->offset == columns.files.records[0].offset);
    CHECK(error->length == columns.files.records[0].length);
  };
  ThrowingReads no_memory{std::bad_alloc()};
  check(no_memory);
  ThrowingReads too_long{std::length_error("vector")};
  check(too_long);
}

TEST_CASE("an interruption stops a slow load, also between the requests of one task") {
  class Slow final : public io::SystemCalls {
   public:
    ssize_t pread(int fd, void* buffer, size_t size, off_t offset) override {
      nap();
      return SystemCalls::pread(fd, buffer, size, offset);
    }
    ssize_t preadv(int fd, const iovec* vectors, int count, off_t offset) override {
      nap();
      return SystemCalls::preadv(fd, vectors, count, offset);
    }
    void nap() {
      ++calls;
      std::this_thread::sleep_for(std::chrono::milliseconds(25));
    }
    std::atomic<int> calls{0};
  };
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options, IoMode::kCached);
  for (const bool one_task : {false, true}) {
    if (one_task) {
      columns.items[0].lengths = {100, 1};
      columns.options.block_bytes = 1 << 20;
    }
    const Program program(layouts, columns.items, columns.destinations);
    Slow slow;
    const ScopedCalls scope(slow);
    CHECK_THROWS_AS(transfer::run_wave(program, 0, columns.options, {}, [] { return true; }), Interrupted);
    CHECK(slow.calls < (one_task ? 100 : 256));
  }
}
