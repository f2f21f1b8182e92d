#include "transfer/layouts.h"

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "checkpoint_files.h"
#include "doctest/doctest.h"
#include "error.h"
#include "faults.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::ParsedRecord;
using transfer::Layouts;
using transfer::Options;
using Status = ParsedRecord::Status;

namespace {

Options options_of(int threads = 3, int64_t block_bytes = 1 << 20) {
  Options options;
  options.threads = threads;
  options.block_bytes = block_bytes;
  return options;
}

std::optional<Error> error_of(const CheckpointFiles& files, io::IoMode mode, const Options& options = options_of()) {
  try {
    files.layouts(options, mode);
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

TensorSpec vector_spec(int64_t elements) { return {0, {elements}, {1}, 0, elements}; }

size_t add_vector(CheckpointFiles& files, size_t file, int64_t elements, size_t alignment = 64) {
  const std::string storage(static_cast<size_t>(elements * 4), static_cast<char>('a' + files.records.size() % 26));
  return files.add(file, vector_spec(elements), storage, alignment);
}

// Everything that a good layout says of a record, checked against how it was built.
void check_layout(const CheckpointFiles& files, const Layouts& layouts, size_t index) {
  const ParsedRecord& parsed = layouts.parsed[index];
  const CheckpointFiles::Stored& stored = files.stored[index];
  REQUIRE(parsed.reason == "");
  REQUIRE(parsed.status == Status::kTensor);
  REQUIRE(parsed.layout.dtype == stored.spec.dtype);
  REQUIRE(parsed.layout.sizes == stored.spec.sizes);
  REQUIRE(parsed.layout.strides == stored.spec.strides);
  if (span_of(stored.spec.sizes, stored.spec.strides) == 0) return;
  const auto offset = static_cast<size_t>(stored.spec.storage_offset * itemsize(stored.spec));
  const auto begin = static_cast<size_t>(files.records[index].offset + parsed.layout.begin);
  const std::string& bytes = files.bytes[files.records[index].file];
  REQUIRE(bytes.compare(begin, stored.storage.size() - offset, stored.storage, offset) == 0);
}

}  // namespace

TEST_CASE("layouts of records of all sizes, in several files, with any options") {
  Random random(90);
  for (int i = 0; i < 60; ++i) {
    CheckpointFiles files(random.below(4) + 1);
    for (int64_t records = random.between(1, 25); records > 0; --records) {
      const size_t file = random.below(files.bytes.size());
      if (random.chance(10)) {
        files.add_bytes(file, random.bytes(random.below(3000)), random.chance(50));
      } else if (random.chance(15)) {  // both ends in requests of their own
        add_vector(files, file, random.between(2000, 40000), random.pick(std::vector<size_t>{64, 512, 4096}));
      } else {
        const auto dtype = static_cast<checkpoint::DType>(random.below(checkpoint::kDTypes.size()));
        files.add_random(random, file, dtype, random_sizes(random, random.below(4), 0, 9), random.chance(50));
      }
      if (random.chance(20)) files.bytes[file] += random.bytes(random.below(20000));  // what others wrote
    }
    // Records may come in any order, more than once, and overlap.
    for (int64_t again = random.between(0, 3); again > 0; --again) {
      const size_t index = random.below(files.records.size());
      files.records.push_back(files.records[index]);
      files.stored.push_back(files.stored[index]);
    }
    for (size_t r = files.records.size(); r > 1; --r) {
      const size_t other = random.below(r);
      std::swap(files.records[r - 1], files.records[other]);
      std::swap(files.stored[r - 1], files.stored[other]);
    }
    files.write();
    const io::IoMode mode =
        random.pick(std::vector<io::IoMode>{io::IoMode::kAuto, io::IoMode::kCached, io::IoMode::kDirect});
    const Options options =
        options_of(static_cast<int>(random.between(1, 6)), random.pick(std::vector<int64_t>{0, 1, 100000, 1 << 20}));
    const Layouts layouts = files.layouts(options, mode);
    REQUIRE(layouts.parsed.size() == files.records.size());
    REQUIRE(layouts.sources.size() == files.paths.size());
    for (const auto& source : layouts.sources) {
      REQUIRE(source->access().request_cost > 0);
      if (mode == io::IoMode::kCached) REQUIRE(!source->access().whole_pages);
    }
    for (size_t r = 0; r < files.records.size(); ++r) {
      if (!files.stored[r].spec.sizes.empty() || !files.stored[r].storage.empty()) {
        check_layout(files, layouts, r);
      } else {
        REQUIRE(layouts.parsed[r].status == Status::kUnknown);
        REQUIRE(layouts.parsed[r].reason != "");
      }
    }
  }
}

TEST_CASE("small neighbours share a request, and payloads of large records are not read") {
  CheckpointFiles files(1);
  for (int i = 0; i < 200; ++i) add_vector(files, 0, 100);
  files.write();
  Layouts layouts = files.layouts(options_of(), io::IoMode::kCached);
  CHECK(layouts.requests <= 2);
  CheckpointFiles large(1);
  for (int i = 0; i < 8; ++i) add_vector(large, 0, 100000);
  large.write();
  layouts = large.layouts(options_of(), io::IoMode::kCached);
  CHECK(layouts.requests <= 9);  // the end of one and the start of the next lie together
  CHECK(layouts.bytes <= 8 * (checkpoint::kHeadBytes + checkpoint::kTailBytes));
  for (size_t i = 0; i < 8; ++i) check_layout(large, layouts, i);
}

TEST_CASE("fallback records are not looked into, but their range is checked") {
  CheckpointFiles files(1);
  const size_t fallback = files.add_bytes(0, tensor_record(vector_spec(10), std::string(39, 'x')), true);
  files.write();
  CHECK(files.layouts(options_of(), io::IoMode::kCached).parsed[fallback].status == Status::kUnknown);
  files.records[fallback].length += 1;
  const auto error = error_of(files, io::IoMode::kCached);
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
}

TEST_CASE("a record that reaches past its file is truncated, with every fact") {
  for (const io::IoMode mode : {io::IoMode::kAuto, io::IoMode::kCached, io::IoMode::kDirect}) {
    CheckpointFiles files(2);
    add_vector(files, 0, 10);
    add_vector(files, 1, 10);
    add_vector(files, 1, 30000);
    files.write();
    const auto size = static_cast<int64_t>(files.bytes[1].size());
    const transfer::Record good = files.records[2];
    std::filesystem::resize_file(files.paths[1], static_cast<uintmax_t>(size - 1));
    auto error = error_of(files, mode);
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kTruncated);
    CHECK(error->record == 2);
    CHECK(error->path == files.paths[1]);
    CHECK(error->offset == good.offset);
    CHECK(error->length == good.length);
    for (const auto& [offset, length] : std::vector<std::pair<int64_t, int64_t>>{
             {-1, 10}, {0, -1}, {INT64_MAX, 10}, {10, INT64_MAX}, {size, 1}, {INT64_MIN, INT64_MAX}}) {
      files.records[2].offset = offset;
      files.records[2].length = length;
      error = error_of(files, mode);
      REQUIRE(error.has_value());
      CHECK(error->kind == ErrorKind::kTruncated);
      CHECK(error->record == 2);
      CHECK(error->offset == offset);
      CHECK(error->length == length);
    }
  }
}

TEST_CASE("a corrupt record is an error with record, path and range") {
  for (const int64_t elements : {int64_t{10}, int64_t{100000}}) {  // read whole, and at both ends
    CheckpointFiles files(2);
    add_vector(files, 0, 10);
    add_vector(files, 1, 50000);
    const size_t bad = files.add_bytes(
        1, tensor_record(vector_spec(elements), std::string(3, 'x')) + std::string(static_cast<size_t>(0), 'x'));
    add_vector(files, 1, 10);
    if (elements > 1000) {
      std::string record = tensor_record(vector_spec(elements), std::string(static_cast<size_t>(4 * elements), 'x'));
      record[record.find("FloatStorage")] = 'D';
      files.bytes[1].resize(static_cast<size_t>(files.records[bad].offset));
      files.records[bad].length = static_cast<int64_t>(record.size());
      files.bytes[1] += record;
      files.records.pop_back();
      files.stored.pop_back();
    }
    files.write();
    const auto error = error_of(files, io::IoMode::kCached);
    REQUIRE(error.has_value());
    CHECK(error->kind == (elements > 1000 ? ErrorKind::kCorruptPickle : ErrorKind::kCorrupt));
    CHECK(error->record == static_cast<int64_t>(bad));
    CHECK(error->path == files.paths[1]);
    CHECK(error->offset == files.records[bad].offset);
    CHECK(error->length == files.records[bad].length);
  }
}

TEST_CASE("a missing file and every failing call are errors with path, record and errno") {
  CheckpointFiles files(2);
  for (int i = 0; i < 6; ++i) add_vector(files, static_cast<size_t>(i % 2), i < 3 ? 20 : 40000, i == 5 ? 4096 : 64);
  files.write();
  for (const io::FaultFunction function :
       {io::FaultFunction::kOpen, io::FaultFunction::kFstat, io::FaultFunction::kPread}) {
    int64_t nth = 0;
    for (bool failed = true; failed; ++nth) {
      REQUIRE(nth < 100);
      io::FaultySystemCalls calls(fault(function, nth, EIO));
      const ScopedCalls scope(calls);
      const auto error = error_of(files, io::IoMode::kCached, options_of(nth % 2 == 0 ? 1 : 4));
      failed = error.has_value();
      REQUIRE(failed == (calls.calls() > nth));
      if (!failed) continue;
      REQUIRE(error->kind == ErrorKind::kIo);
      REQUIRE(error->error_number == EIO);
      REQUIRE(error->record >= 0);
      REQUIRE(error->path == files.paths[files.records[static_cast<size_t>(error->record)].file]);
    }
    CHECK(nth > 2);
  }
  std::filesystem::remove(files.paths[1]);
  const auto error = error_of(files, io::IoMode::kAuto);
  REQUIRE(error.has_value());
  CHECK(error->error_number == ENOENT);
  CHECK(error->path == files.paths[1]);
  CHECK(error->record >= 0);
}

TEST_CASE("memory that a layout cannot have is an error with record, path and range") {
  CheckpointFiles files(2);
  add_vector(files, 1, 10);
  files.write();
  const auto check = [&](io::SystemCalls& calls) {
    const ScopedCalls scope(calls);
    const auto error = error_of(files, io::IoMode::kCached);
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kIo);
    CHECK(error->error_number == ENOMEM);
    CHECK(error->record == 0);
    CHECK(error->path == files.paths[1]);
    CHECK(error->offset == files.records[0].offset);
    CHECK(error->length == files.records[0].length);
  };
  ThrowingReads no_memory{std::bad_alloc()};
  check(no_memory);
  ThrowingReads too_long{std::length_error("vector")};
  check(too_long);
}

TEST_CASE("no records and no files are nothing to read") {
  CheckpointFiles files(1);
  files.write();
  CHECK(files.layouts(options_of(), io::IoMode::kAuto).requests == 0);
  CHECK(CheckpointFiles(0).layouts(options_of(), io::IoMode::kAuto).parsed.empty());
}

TEST_CASE("layouts: payloads are taken as they are told, and nothing is read but the sizes of files") {
  CheckpointFiles files(2);
  const size_t first = files.add_bytes(0, std::string(24, 'a'));
  const size_t second = files.add_bytes(1, std::string(8, 'b'));
  files.write();
  const std::vector<checkpoint::TensorLayout> payloads = {{0, 0, {2, 3}, {3, 1}}, {1, 0, {1}, {1}}};
  const auto read = [&](const std::vector<transfer::Record>& records) {
    io::ByteSources sources;
    for (const std::string& path : files.paths) sources.push_back(std::make_unique<io::File>(path));
    return read_layouts(std::move(sources), records, payloads, options_of());
  };

  const Layouts layouts = read(files.records);
  CHECK(layouts.are_payloads);
  CHECK(layouts.requests == 0);
  CHECK(layouts.bytes == 0);
  CHECK(layouts.parsed[first].status == Status::kTensor);
  CHECK(layouts.parsed[first].layout.sizes == Ints{2, 3});
  CHECK(layouts.parsed[second].layout.dtype == 1);

  files.records[second].offset = 1;
  std::optional<Error> error;
  try {
    read(files.records);
  } catch (const Error& caught) {
    error = caught;
  }
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kTruncated);
  CHECK(error->record == static_cast<int64_t>(second));
  CHECK(error->path == files.paths[1]);
}
