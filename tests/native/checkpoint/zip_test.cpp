#include "checkpoint/zip.h"

#include <algorithm>
#include <string>
#include <vector>

#include "archive_builder.h"
#include "checkpoint/zip_tail.h"
#include "doctest/doctest.h"
#include "exact.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::ZipEntry;
using checkpoint::ZipTail;
using Status = checkpoint::ZipTail::Status;

namespace {

const std::vector<std::pair<std::string, std::string>> kContents = {
    {"data.pkl", std::string(150, 'p')}, {"byteorder", "little"}, {"data/0", std::string(1000, 'd')}, {"empty", ""}};

Archive sample() {
  Archive archive;
  for (const auto& [name, data] : kContents) archive.add(name, data);
  return archive;
}

ZipTail parse(const Tail& tail) {
  const Exact exact(tail.bytes);
  ZipTail parsed = checkpoint::parse_zip_tail(exact.view(), tail.archive_size);
  for (ZipEntry& entry : parsed.directory.entries) entry.name = {};  // views into what is about to be freed
  return parsed;
}

// Whatever was accepted may be used without further checks.
void check_consistent(const ZipTail& parsed, const Exact& tail, uint64_t archive_size) {
  REQUIRE(parsed.directory.begin <= archive_size);
  const auto* first = reinterpret_cast<const char*>(tail.data());
  for (const ZipEntry& entry : parsed.directory.entries) {
    REQUIRE(entry.header_offset <= parsed.directory.begin);
    REQUIRE(entry.size <= parsed.directory.begin - entry.header_offset);
    REQUIRE(entry.name.data() >= first);
    REQUIRE(entry.name.data() + entry.name.size() <= first + tail.size());
  }
}

}  // namespace

TEST_CASE("crc32 of known vectors") {
  const auto crc = [](const std::string& text) {
    const Exact exact(text);
    return checkpoint::crc32(exact.data(), exact.size());
  };
  CHECK(crc("") == 0U);
  CHECK(crc("123456789") == 0xCBF43926U);
  CHECK(crc("a") == 0xE8B7BE43U);
  CHECK(crc("The quick brown fox jumps over the lazy dog") == 0x414FA339U);
  CHECK(crc(std::string(32, '\0')) == 0x190A55ADU);
  CHECK(crc(std::string(32, '\xff')) == 0xFF6CAB0BU);
}

TEST_CASE("a directory is read with and without zip64 end records") {
  for (const bool zip64 : {true, false}) {
    CAPTURE(zip64);
    Archive archive = sample();
    archive.zip64_end = zip64;
    const std::string bytes = archive.finish();
    const Exact exact(bytes);
    const ZipTail parsed = checkpoint::parse_zip_tail(exact.view(), bytes.size());
    REQUIRE(parsed.status == Status::kParsed);
    REQUIRE(parsed.directory.entries.size() == kContents.size());
    for (size_t i = 0; i < kContents.size(); ++i) {
      const ZipEntry& entry = parsed.directory.entries[i];
      CHECK(entry.name == "archive/" + kContents[i].first);
      CHECK(entry.size == kContents[i].second.size());
      const auto offset = checkpoint::local_data_offset(exact.view(), entry);
      REQUIRE(offset.has_value());
      CHECK(*offset % 64 == 0);
      CHECK(bytes.substr(*offset, entry.size) == kContents[i].second);
      CHECK(entry.crc32 == checkpoint::crc32(exact.data() + *offset, entry.size));
      CHECK(checkpoint::local_header_end(entry) == entry.header_offset + 30 + entry.name.size());
    }
  }
}

TEST_CASE("every tail of an archive is parsed, or says how much it takes, or is unknown") {
  for (const bool zip64 : {true, false}) {
    CAPTURE(zip64);
    Archive archive = sample();
    archive.zip64_end = zip64;
    const std::string bytes = archive.finish();
    uint64_t needed = 0;
    for (size_t size = 0; size <= bytes.size(); ++size) {
      CAPTURE(size);
      const Exact exact(std::string_view(bytes).substr(bytes.size() - size));
      const ZipTail parsed = checkpoint::parse_zip_tail(exact.view(), bytes.size());
      if (parsed.status == Status::kParsed) {
        REQUIRE(parsed.directory.entries.size() == kContents.size());
        REQUIRE(size >= needed);
      } else if (parsed.status == Status::kNeedsMore) {
        if (needed == 0) needed = parsed.needed;
        REQUIRE(parsed.needed == needed);
        REQUIRE(needed > size);
        REQUIRE(needed < bytes.size());
      } else {
        REQUIRE(size < 98);
      }
    }
    CHECK(needed > 98);
  }
}

TEST_CASE("an archive that was cut short or extended is unknown") {
  const std::string bytes = sample().finish();
  for (size_t size = 0; size < bytes.size(); ++size) {
    const Exact exact(std::string_view(bytes).substr(0, size));
    REQUIRE(checkpoint::parse_zip_tail(exact.view(), size).status == Status::kUnknown);
  }
  for (const std::string& suffix : {std::string(1, '\0'), std::string(22, 'x'), bytes.substr(bytes.size() - 22)}) {
    const Exact exact(bytes + suffix);
    CHECK(checkpoint::parse_zip_tail(exact.view(), exact.size()).status == Status::kUnknown);
  }
  const Exact exact(bytes);
  for (const uint64_t size : {bytes.size() + 1, bytes.size() + 4096, bytes.size() * 1000}) {
    CHECK(checkpoint::parse_zip_tail(exact.view(), size).status == Status::kUnknown);
  }
}

TEST_CASE("entries past 4 GiB come from the zip64 extra field") {
  constexpr uint64_t kGiB = uint64_t{1} << 30;
  RawEntry big{"archive/data/0", 20 * kGiB, 64};
  RawEntry late{"archive/version", 2, 20 * kGiB + 4096};
  RawEntry both{"archive/more", 5 * kGiB, 21 * kGiB};
  both.foreign_extra = std::string("FB\x03\x00ZZZ", 7);
  const ZipTail parsed = parse(make_tail({big, late, both}, 27 * kGiB));
  REQUIRE(parsed.status == Status::kParsed);
  CHECK(parsed.directory.begin == 27 * kGiB);
  CHECK(parsed.directory.entries[0].size == 20 * kGiB);
  CHECK(parsed.directory.entries[0].header_offset == 64U);
  CHECK(parsed.directory.entries[1].size == 2U);
  CHECK(parsed.directory.entries[1].header_offset == 20 * kGiB + 4096);
  CHECK(parsed.directory.entries[2].size == 5 * kGiB);
  CHECK(parsed.directory.entries[2].header_offset == 21 * kGiB);
}

TEST_CASE("saturated fields without their 64-bit values are unknown") {
  constexpr uint64_t kGiB = uint64_t{1} << 30;
  RawEntry entry{"archive/data/0", 5 * kGiB, 0};
  CHECK(parse(make_tail({entry}, 6 * kGiB)).status == Status::kParsed);
  CHECK(parse(make_tail({entry}, 6 * kGiB, false)).status == Status::kUnknown);
  entry.zip64_extra = false;
  CHECK(parse(make_tail({entry}, 6 * kGiB)).status == Status::kUnknown);
  std::string short_extra;  // promises one value, needs two
  append(short_extra, 1, 2);
  append(short_extra, 8, 2);
  append(short_extra, 5 * kGiB, 8);
  entry.foreign_extra = short_extra;
  CHECK(parse(make_tail({entry}, 6 * kGiB)).status == Status::kUnknown);
  entry.foreign_extra = std::string("FB\xff\xff", 4);  // reaches past the entry
  CHECK(parse(make_tail({entry}, 6 * kGiB)).status == Status::kUnknown);
}

TEST_CASE("entries that torch.save never writes are unknown") {
  const RawEntry good{"archive/data/0", 100, 0};
  CHECK(parse(make_tail({good}, 1000)).status == Status::kParsed);
  CHECK(parse(make_tail({good}, 1000, false)).status == Status::kParsed);
  CHECK(parse(make_tail({}, 0)).status == Status::kParsed);
  RawEntry bad = good;
  bad.method = 8;
  CHECK(parse(make_tail({bad}, 1000)).status == Status::kUnknown);
  bad = good;
  bad.flags = 0x809;
  CHECK(parse(make_tail({bad}, 1000)).status == Status::kUnknown);
  bad = good;
  bad.compressed = 99;
  CHECK(parse(make_tail({bad}, 1000)).status == Status::kUnknown);
  bad = good;
  bad.size = 1001;
  CHECK(parse(make_tail({bad}, 1000)).status == Status::kUnknown);
  bad = good;
  bad.header_offset = 901;
  CHECK(parse(make_tail({bad}, 1000)).status == Status::kUnknown);
  bad.header_offset = UINT64_MAX;
  bad.size = UINT64_MAX - 1;
  CHECK(parse(make_tail({bad}, 1000)).status == Status::kUnknown);
  CHECK(parse(make_tail(std::vector<RawEntry>(1000, good), 1000)).status == Status::kUnknown);
  // Bytes between the directory and its end records.
  Tail gap = make_tail({good}, 1000, false);
  gap.bytes.insert(gap.bytes.size() - 22, "x");
  gap.archive_size += 1;
  CHECK(parse(gap).status == Status::kUnknown);
}

TEST_CASE("random damage is never read out of bounds and never accepted with ranges that do not fit") {
  Random random(20);
  int accepted = 0;
  for (int i = 0; i < 40000; ++i) {
    Archive archive = sample();
    archive.zip64_end = random.chance(70);
    static const std::string originals[2] = {sample().finish(), [] {
                                               Archive plain = sample();
                                               plain.zip64_end = false;
                                               return plain.finish();
                                             }()};
    std::string bytes = originals[archive.zip64_end ? 0 : 1];
    const size_t window = std::min<size_t>(bytes.size(), 450);
    for (int64_t flips = random.between(1, 4); flips > 0; --flips) {
      const size_t position = bytes.size() - 1 - random.below(window);
      bytes[position] = random.chance(30) ? '\xff' : static_cast<char>(random.between(0, 255));
    }
    const Exact tail(std::string_view(bytes).substr(random.chance(20) ? random.below(bytes.size()) : 0));
    const ZipTail parsed = checkpoint::parse_zip_tail(tail.view(), bytes.size());
    if (parsed.status == Status::kNeedsMore) REQUIRE(parsed.needed > tail.size());
    if (parsed.status != Status::kParsed) continue;
    ++accepted;
    check_consistent(parsed, tail, bytes.size());
    for (const ZipEntry& entry : parsed.directory.entries) {
      const Exact head(std::string_view(bytes).substr(0, random.below(bytes.size())));
      static_cast<void>(checkpoint::local_data_offset(head.view(), entry));
    }
  }
  CHECK(accepted > 0);
}

TEST_CASE("local headers must be there, whole and of the same name") {
  const std::string bytes = sample().finish();
  const Exact whole(bytes);
  const ZipTail parsed = checkpoint::parse_zip_tail(whole.view(), bytes.size());
  const ZipEntry entry = parsed.directory.entries[1];
  const uint64_t end = checkpoint::local_header_end(entry);
  for (size_t size = 0; size < end + 10; ++size) {
    const Exact head(std::string_view(bytes).substr(0, size));
    REQUIRE(checkpoint::local_data_offset(head.view(), entry).has_value() == (size >= end));
  }
  for (const size_t position : {0, 3, 6, 8, 26, 30, 35}) {  // signature, flags, method, name
    std::string damaged = bytes;
    damaged[entry.header_offset + position] ^= 1;
    CAPTURE(position);
    CHECK_FALSE(checkpoint::local_data_offset(Exact(damaged).view(), entry).has_value());
  }
  ZipEntry outside = entry;
  for (const uint64_t offset : {uint64_t{bytes.size()}, uint64_t{bytes.size()} + 1, UINT64_MAX, UINT64_MAX - 8}) {
    outside.header_offset = offset;
    CHECK_FALSE(checkpoint::local_data_offset(whole.view(), outside).has_value());
  }
}
