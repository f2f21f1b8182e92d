#include "transfer/engine.h"

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

std::byte* data_of(std::string& memory) { return reinterpret_cast<std::byte*>(memory.data()); }

Options random_options(Random& random) {
  Options options;
  options.threads = static_cast<int>(random.between(1, 6));
  options.block_bytes = random.pick(std::vector<int64_t>{0, 70000, 1 << 20});
  options.staging_bytes = random.pick(std::vector<int64_t>{0, 300000, 32 << 20});
  options.mode = random.pick(std::vector<IoMode>{IoMode::kAuto, IoMode::kCached, IoMode::kDirect});
  return options;
}

Ints sizes_like(Random& random, size_t dims) {
  if (dims == 2 && random.chance(15)) return {random.between(50, 400), random.between(50, 400)};
  if (dims == 1 && random.chance(15)) return {random.between(1000, 100000)};
  return random_sizes(random, dims, random.chance(5) ? 0 : 1, 8);
}

// One load: files, destinations that may share memory, and boxes.
struct Load {
  explicit Load(Random& random) : files(random.below(3) + 1) {
    const auto dtype = static_cast<checkpoint::DType>(random.below(checkpoint::kDTypes.size()));
    const size_t dims = random.below(5);
    for (int64_t i = random.between(1, 8); i > 0; --i) {
      files.add_random(random, random.below(files.bytes.size()), dtype, sizes_like(random, dims), random.chance(60));
    }
    files.write();
    std::vector<int64_t> starts;
    int64_t bytes = 0;
    for (int64_t i = random.between(1, 4); i > 0; --i) {
      Destination destination;
      destination.sizes = sizes_like(random, dims);
      destination.strides = random_strides(random, destination.sizes);
      destination.dtype = dtype;
      destination.writable_by_host = random.chance(85);
      const int64_t size = checkpoint::info(dtype).itemsize;
      starts.push_back(bytes > 0 && random.chance(25) ? random.between(0, bytes / size - 1) * size : bytes);
      bytes = std::max(bytes, starts.back() + span_of(destination.sizes, destination.strides) * size);
      destinations.push_back(destination);
    }
    memory = std::string(static_cast<size_t>(bytes), '#');
    place(memory, starts);
    for (int64_t i = random.between(0, 10); i > 0; --i) {
      const size_t record = random.below(files.records.size());
      const size_t destination = random.below(destinations.size());
      items.push_back(
          random_item(random, files.stored[record].spec.sizes, destinations[destination].sizes, record, destination));
    }
    // In torch's order: file by file.
    std::string copy = memory;
    place(copy, starts);
    for (size_t file = 0; file < files.bytes.size(); ++file) {
      for (const Item& item : items) {
        if (files.records[item.record].file == file) copy_item(files, item, destinations[item.destination]);
      }
    }
    expected = copy;
    place(memory, starts);
  }

  void place(std::string& where, const std::vector<int64_t>& starts) {
    for (size_t i = 0; i < destinations.size(); ++i) destinations[i].data = data_of(where) + starts[i];
  }

  CheckpointFiles files;
  std::vector<Destination> destinations;
  std::vector<Item> items;
  std::string memory;
  std::string expected;
};

// A matrix of many blocks, and its columns wanted: some hundred requests.
struct Columns {
  Columns() : files(1) {
    Random random(101);
    files.add_random(random, 0, 0, {256, 8192}, true);
    files.write();
    memory.assign(256 * 4096 * 4, '#');
    Destination destination;
    destination.data = data_of(memory);
    destination.writable_by_host = true;
    destination.sizes = {256, 4096};
    destination.strides = {4096, 1};
    destination.dtype = 0;
    destinations.push_back(destination);
    Item item;
    item.lengths = {256, 4096};
    item.storage_offsets = {0, 1024};
    item.destination_offsets = {0, 0};
    items.push_back(item);
    options.mode = IoMode::kCached;
    options.threads = 2;
    options.block_bytes = 0;
  }
  CheckpointFiles files;
  std::string memory;
  std::vector<Destination> destinations;
  std::vector<Item> items;
  Options options;
};

std::optional<Error> error_of(const Program& program, const Options& options) {
  try {
    transfer::run_wave(program, 0, options, never);
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
  for (int i = 0; i < 400; ++i) {
    CAPTURE(i);
    Load load(random);
    const Options options = random_options(random);
    const Layouts layouts = load.files.layouts(options);
    const Program program(layouts, load.items, load.destinations);
    int64_t placed = 0;
    for (int32_t wave = 0; wave < program.waves(); ++wave) {
      const transfer::Stats stats = transfer::run_wave(program, wave, options, never);
      REQUIRE(stats.bytes_read >= stats.bytes_placed);
      placed += stats.bytes_placed;
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
    REQUIRE(load.memory == load.expected);
  }
  CHECK(direct > 800);
  CHECK(waves > 500);
}

TEST_CASE("blocks of the smallest size still read little more than they need") {
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options);
  const Program program(layouts, columns.items, columns.destinations);
  const transfer::Stats stats = transfer::run_wave(program, 0, columns.options, never);
  CHECK(stats.bytes_placed == 256 * 4096 * 4);
  CHECK(stats.bytes_placed == program.bytes_needed());
  CHECK(stats.bytes_read == stats.bytes_placed);  // rows of 16 KiB are read one by one, straight into place
  CHECK(stats.requests == 256);
}

TEST_CASE("every failing read is an error with item, record, path and errno, and cancels the rest") {
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options);
  const Program program(layouts, columns.items, columns.destinations);
  for (const IoMode mode : {IoMode::kCached, IoMode::kDirect}) {
    Options options = columns.options;
    options.mode = mode;
    const Layouts in_mode = columns.files.layouts(options);
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
        if (mode == IoMode::kCached) CHECK(calls.calls() < 200);
      }
    }
  }
  io::FaultySystemCalls ends(fault(io::FaultFunction::kPread, 5, 0, 1, 0));
  const ScopedCalls scope(ends);
  const auto error = error_of(program, columns.options);
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
}

TEST_CASE("short and interrupted reads change nothing") {
  for (const int error_number : {0, EINTR}) {
    Columns columns;
    const Layouts layouts = columns.files.layouts(columns.options);
    const Program program(layouts, columns.items, columns.destinations);
    io::FaultySystemCalls calls(fault(io::FaultFunction::kPread, 0, error_number, 100, 3));
    const ScopedCalls scope(calls);
    transfer::run_wave(program, 0, columns.options, never);
    std::string expected(columns.memory.size(), '#');
    Destination destination = columns.destinations[0];
    destination.data = data_of(expected);
    copy_item(columns.files, columns.items[0], destination);
    CHECK((columns.memory == expected));
  }
}

TEST_CASE("a file that was cut between layout and load is truncated") {
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options);
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
  const Layouts layouts = columns.files.layouts(columns.options);
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

TEST_CASE("an interruption stops a slow load within a second, also between the requests of one task") {
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
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    std::atomic<int> calls{0};
  };
  Columns columns;
  const Layouts layouts = columns.files.layouts(columns.options);
  for (const bool one_task : {false, true}) {
    if (one_task) {
      columns.items[0].lengths = {100, 1};
      columns.options.block_bytes = 1 << 20;
    }
    const Program program(layouts, columns.items, columns.destinations);
    Slow slow;
    const ScopedCalls scope(slow);
    const auto start = std::chrono::steady_clock::now();
    CHECK_THROWS_AS(transfer::run_wave(program, 0, columns.options, [] { return true; }), transfer::Interrupted);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(1));
    CHECK(slow.calls < (one_task ? 50 : 256));
  }
}
