#include "transfer/record_reads.h"

#include <cstring>
#include <filesystem>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "checkpoint_files.h"
#include "doctest/doctest.h"
#include "error.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using transfer::Layouts;
using transfer::Options;
using transfer::RecordBytes;

namespace {

constexpr int64_t kNoLimit = int64_t{1} << 40;

Options options_of(int threads) {
  Options options;
  options.threads = threads;
  options.block_bytes = 70000;
  return options;
}

std::string text_of(const RecordBytes& record) {
  return {reinterpret_cast<const char*>(record.data.get()), record.size};
}

std::string record_of(const CheckpointFiles& files, size_t index) {
  const transfer::Record& record = files.records[index];
  return files.bytes[record.file].substr(static_cast<size_t>(record.offset), static_cast<size_t>(record.length));
}

// Records of given sizes, all in one file.
std::unique_ptr<CheckpointFiles> files_of(const std::vector<size_t>& sizes) {
  auto files = std::make_unique<CheckpointFiles>(1);
  Random random(7);
  for (const size_t size : sizes) files->add_bytes(0, random.bytes(size), true);
  files->write();
  return files;
}

std::vector<size_t> count_up(size_t count) {
  std::vector<size_t> numbers;
  for (size_t i = 0; i < count; ++i) numbers.push_back(i);
  return numbers;
}

}  // namespace

TEST_CASE("record reads: any records in any order, with any limits") {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    CheckpointFiles files(random.below(3) + 1);
    for (int64_t i = random.between(0, 30); i > 0; --i) {
      const auto size = static_cast<size_t>(random.chance(80) ? random.between(0, 3000) : random.between(0, 400000));
      files.add_bytes(random.below(files.bytes.size()), random.bytes(size), true);
    }
    files.write();
    std::vector<size_t> records;
    if (!files.records.empty()) {
      for (int64_t i = random.between(0, 40); i > 0; --i) records.push_back(random.below(files.records.size()));
    }
    const auto mode = random.pick(std::vector<io::IoMode>{io::IoMode::kCached, io::IoMode::kDirect});
    const Options options = options_of(static_cast<int>(random.between(1, 5)));
    const auto most = random.pick(std::vector<int64_t>{0, 1, 5000, 300000, kNoLimit});
    const Layouts layouts = files.layouts(options, mode);
    size_t next = 0;
    std::vector<RecordBytes> kept;
    const auto stats = transfer::read_records(layouts, records, most, options, never, [&](size_t i, RecordBytes bytes) {
      REQUIRE(i == next++);
      REQUIRE(reinterpret_cast<uintptr_t>(bytes.data.get()) % transfer::kRecordAlignment == 0);
      REQUIRE(text_of(bytes) == record_of(files, records[i]));
      // Whoever takes them may write there.
      std::memset(bytes.data.get(), 'x', bytes.size);
      if (random.chance(30)) kept.push_back(std::move(bytes));
    });
    CHECK(next == records.size());
    int64_t total = 0;
    for (const size_t record : records) total += files.records[record].length;
    CHECK(stats.bytes_placed == total);
    CHECK(stats.bytes_read >= total);
    for (const RecordBytes& bytes : kept) CHECK(text_of(bytes) == std::string(bytes.size, 'x'));
  }
}

TEST_CASE("record reads: no more is read ahead than there is memory for") {
  constexpr size_t kSize = 256 << 10;
  const auto files = files_of(std::vector<size_t>(20, kSize));
  for (const size_t ahead : {size_t{0}, size_t{1}, size_t{3}}) {
    const Options options = options_of(4);
    const Layouts layouts = files->layouts(options, io::IoMode::kCached);
    std::set<const std::byte*> places;
    size_t taken = 0;
    transfer::read_records(layouts, count_up(20), static_cast<int64_t>(ahead * kSize), options, never,
                           [&](size_t, const RecordBytes& bytes) { places.insert(bytes.data.get()), ++taken; });
    CHECK(taken == 20);
    CHECK(places.size() <= ahead + 1);
  }
}

TEST_CASE("record reads: small neighbours come with one request") {
  const auto files = files_of(std::vector<size_t>(1000, 500));
  const Options options;
  const Layouts layouts = files->layouts(options, io::IoMode::kCached);
  const auto stats =
      transfer::read_records(layouts, count_up(1000), 8 << 20, options, never, [](size_t, RecordBytes) {});
  CHECK(stats.requests <= 2);
  CHECK(stats.bytes_read == 500000);
}

TEST_CASE("record reads: errors name the record, and those of whoever takes them come through") {
  const auto files = files_of({1000, 2000000, 3000});
  for (const int threads : {1, 4}) {
    const Options options = options_of(threads);
    const Layouts layouts = files->layouts(options, io::IoMode::kCached);
    const auto read = [&](const std::function<void(size_t, RecordBytes)>& take) {
      transfer::read_records(layouts, count_up(3), kNoLimit, options, never, take);
    };
    CHECK_THROWS_AS(read([](size_t, const RecordBytes&) { throw std::logic_error("taken"); }), std::logic_error);
    std::filesystem::resize_file(files->paths[0], 1500000);
    try {
      read([](size_t, const RecordBytes&) {});
      FAIL("the file is too short");
    } catch (const Error& error) {
      CHECK(error.kind == ErrorKind::kTruncated);
      CHECK(error.record == 1);
      CHECK(error.path == files->paths[0]);
      CHECK(error.offset >= 1000);
      CHECK(error.offset + error.length > 1500000);
    }
    files->dir.write("0.distcp", files->bytes[0]);
  }
}
