#include "checkpoint/archive.h"

#include <string>

#include "archive_builder.h"
#include "doctest/doctest.h"
#include "exact.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::find_archive;

namespace {

testing::Archive two_storages() {
  testing::Archive archive = testing::Archive::of_tensor("pickle", "first storage");
  archive.add("data/other", std::string(1000, 's'));
  return archive;
}

bool is_found(const std::string& record) { return find_archive(Exact(record).view()).has_value(); }

}  // namespace

TEST_CASE("archive: the pickle and all storages") {
  const std::string record = two_storages().finish();
  const Exact bytes(record);
  const auto archive = find_archive(bytes.view());
  REQUIRE(archive);
  CHECK(archive->has_checksums);
  checkpoint::Bytes pickle = archive->pickle;
  CHECK(pickle.text(pickle.size()) == "pickle");
  REQUIRE(archive->storages.size() == 2);
  CHECK(archive->storages[0].key == "0");
  CHECK(record.substr(archive->storages[0].begin, archive->storages[0].size) == "first storage");
  CHECK(archive->storages[0].begin % 64 == 0);
  CHECK(archive->storages[1].key == "other");
  CHECK(record.substr(archive->storages[1].begin, archive->storages[1].size) == std::string(1000, 's'));
}

TEST_CASE("archive: what torch reads in another way is left to it") {
  testing::Archive twice = two_storages();
  twice.add("data/0", "again");
  CHECK_FALSE(is_found(twice.finish()));
  testing::Archive program = two_storages();
  program.add("constants.pkl", "program");
  CHECK_FALSE(is_found(program.finish()));
  CHECK_FALSE(is_found(testing::Archive::of_tensor("pickle", "storage", 64, "big").finish()));
  testing::Archive without_order;
  without_order.add("data.pkl", "pickle");
  without_order.add("data/0", "storage");
  without_order.add("version", "3\n");
  CHECK_FALSE(is_found(without_order.finish()));
  testing::Archive unpadded = two_storages();
  unpadded.padded = false;
  CHECK_FALSE(is_found(unpadded.finish()));
}

TEST_CASE("archive: checksums may be missing") {
  testing::Archive archive = two_storages();
  archive.checksums = false;
  const std::string record = archive.finish();
  const Exact bytes(record);
  const auto found = find_archive(bytes.view());
  REQUIRE(found);
  CHECK_FALSE(found->has_checksums);
}

TEST_CASE("archive: damage never leads out of it, nor to other places") {
  const std::string record = two_storages().finish();
  for (size_t length = 0; length < record.size(); ++length) CHECK_FALSE(is_found(record.substr(0, length)));
  const Exact whole(record);
  const auto intact = find_archive(whole.view());
  REQUIRE(intact);
  size_t kept = 0;
  for (size_t at = 0; at < record.size(); ++at) {
    for (const int mask : {0x01, 0x80, 0xff}) {
      std::string damaged = record;
      damaged[at] = static_cast<char>(damaged[at] ^ mask);
      const Exact bytes(damaged);
      const auto found = find_archive(bytes.view());
      if (!found) continue;
      ++kept;
      checkpoint::Bytes pickle = found->pickle;
      REQUIRE(pickle.text(pickle.size()) == "pickle");
      REQUIRE(found->storages.size() == 2);
      for (const size_t i : {0, 1}) {
        REQUIRE(found->storages[i].begin == intact->storages[i].begin);
        REQUIRE(found->storages[i].size == intact->storages[i].size);
      }
    }
  }
  CHECK(kept > 1000);  // of a storage, to name one
}
