#include "checkpoint/value_record.h"

#include <string>
#include <string_view>

#include "archive_builder.h"
#include "doctest/doctest.h"
#include "exact.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::find_value_pickle;

namespace {

const std::string kPickle = "\x80\x02K\x05.";

Archive archive_of(const std::string& pickle) {
  Archive archive;
  archive.add("data.pkl", pickle);
  archive.add(".format_version", "1");
  archive.add(".storage_alignment", "64");
  archive.add("byteorder", "little");
  archive.add("version", "3\n");
  archive.add(".data/serialization_id", std::string(40, '7'));
  return archive;
}

// The pickle that is found, or "none".
std::string found(const std::string& record) {
  const Exact bytes(record);
  const auto pickle = find_value_pickle(bytes.view());
  if (!pickle) return "none";
  REQUIRE(pickle->data() >= bytes.data());
  REQUIRE(pickle->data() + pickle->size() <= bytes.data() + bytes.size());
  return {reinterpret_cast<const char*>(pickle->data()), pickle->size()};
}

}  // namespace

TEST_CASE("value record: as torch.save writes it") {
  CHECK(found(archive_of(kPickle).finish()) == kPickle);
  const std::string large = "\x80\x02X" + std::string(5000, 'a') + ".";
  CHECK(found(archive_of(large).finish()) == large);
}

TEST_CASE("value record: older torch writes fewer entries") {
  Archive archive;
  archive.add("data.pkl", kPickle);
  archive.add("version", "3\n");
  CHECK(found(archive.finish()) == kPickle);
}

TEST_CASE("value record: whatever else it may be is left to torch") {
  CHECK(found("") == "none");
  CHECK(found(kPickle) == "none");
  const auto with = [](const std::string& name, const std::string& data) {
    Archive archive = archive_of(kPickle);
    archive.add(name, data);
    return archive.finish();
  };
  CHECK(found(with("data/0", "storage")) == "none");
  CHECK(found(with("constants.pkl", "program")) == "none");
  CHECK(found(with("data.pkl", kPickle)) == "none");
  Archive big_endian;
  big_endian.add("data.pkl", kPickle);
  big_endian.add("byteorder", "big");
  big_endian.add("version", "3\n");
  CHECK(found(big_endian.finish()) == "none");
  Archive without_version;
  without_version.add("data.pkl", kPickle);
  CHECK(found(without_version.finish()) == "none");
  for (const size_t descriptor : {0, 12, 20, 24}) {
    Archive other_writer = archive_of(kPickle);
    other_writer.descriptor = descriptor;
    CHECK(found(other_writer.finish()) == "none");
  }
  Archive without_checksums = archive_of(kPickle);
  without_checksums.checksums = false;
  CHECK(found(without_checksums.finish()) == "none");
  Archive short_end = archive_of(kPickle);
  short_end.zip64_end = false;
  CHECK(found(short_end.finish()) == "none");
}

TEST_CASE("value record: damage never leads out of it, nor to another pickle") {
  const std::string record = archive_of(kPickle).finish();
  for (size_t length = 0; length < record.size(); ++length) CHECK(found(record.substr(0, length)) == "none");
  size_t kept = 0;
  for (size_t at = 0; at < record.size(); ++at) {
    for (const int mask : {0x01, 0x80, 0xff}) {
      std::string damaged = record;
      damaged[at] = static_cast<char>(damaged[at] ^ mask);
      const std::string pickle = found(damaged);
      if (pickle == "none") continue;
      CHECK(pickle == kPickle);
      ++kept;
    }
  }
  CHECK(kept > 0);  // of padding, times and versions
}
