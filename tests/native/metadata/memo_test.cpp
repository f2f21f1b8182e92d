#include "metadata/memo.h"

#include "doctest/doctest.h"

using dcp_fast::metadata::Keep;
using dcp_fast::metadata::Memo;
using dcp_fast::metadata::Tag;
using dcp_fast::metadata::Value;

TEST_CASE("the memo gives what it kept and knows what it did not") {
  Memo memo;
  for (int64_t i = 0; i < 200'000; i += i % 7 + 1)
    REQUIRE(memo.put(i, Value::of(i), i % 3 == 0 ? Keep::kYes : Keep::kNo));
  for (int64_t i = 0, next = 0; i < 200'000; ++i) {
    const bool was_put = i == next;
    if (was_put) next += i % 7 + 1;
    REQUIRE(memo.was_put(i) == was_put);
    const Value value = memo.get(i);
    REQUIRE(value.is(was_put && i % 3 == 0 ? Tag::kInt : Tag::kUnset));
    if (value.is(Tag::kInt)) REQUIRE(value.number() == i);
  }
  CHECK(memo.get(1ULL << 40).is(Tag::kUnset));
  CHECK_FALSE(memo.was_put(1ULL << 40));
}

TEST_CASE("indices come in order") {
  Memo memo;
  CHECK(memo.count() == 0);
  CHECK(memo.put(5, Value::of(true), Keep::kYes));
  CHECK(memo.count() == 1);
  CHECK_FALSE(memo.put(5, Value::of(false), Keep::kYes));
  CHECK_FALSE(memo.put(4, Value::of(false), Keep::kYes));
  CHECK(memo.get(5) == Value::of(true));
}
