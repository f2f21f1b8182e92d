#include "metadata/text.h"

#include <string>

#include "doctest/doctest.h"
#include "metadata/text_table.h"

using namespace dcp_fast::metadata;

TEST_CASE("UTF-8 with lone surrogates") {
  for (const char* text : {"", "plain ascii text", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\xa0\x80",
                           "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf", "eight by\xc3\xa9tes"}) {
    CAPTURE(text);
    CHECK(is_utf8(text));
  }
  for (const char* text : {"\x80", "\xc1\x80", "\xc3", "\xc3(", "\xe0\x80\x80", "\xe1\x80", "\xf0\x80\x80\x80",
                           "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "eight by\xffs"}) {
    CAPTURE(text);
    CHECK_FALSE(is_utf8(text));
  }
}

TEST_CASE("texts are numbered once") {
  TextTable table;
  CHECK(table.find("a") == TextTable::kNone);
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 5000; ++i) REQUIRE(table.add(std::to_string(i)) == static_cast<uint32_t>(i));
  }
  CHECK(table.size() == 5000);
  CHECK(table[77] == "77");
  CHECK(table.find("4999") == 4999);
  CHECK(table.find("5000") == TextTable::kNone);
}
