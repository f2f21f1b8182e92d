#include "io/kept_source.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "error.h"
#include "io/memory_source.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using io::KeptRange;
using io::KeptSource;
using io::MemorySource;

namespace {

const std::byte* bytes_of(const std::string& text) { return reinterpret_cast<const std::byte*>(text.data()); }

// Whether there is a range, and one alone, that has all of it.
bool is_one(const std::vector<KeptRange>& ranges, int64_t begin, size_t size) {
  return std::any_of(ranges.begin(), ranges.end(), [=](const KeptRange& range) {
    return range.begin <= begin && begin + static_cast<int64_t>(size) <= range.end;
  });
}

}  // namespace

TEST_CASE("what is kept comes from memory, and all else from the source") {
  Random random(90);
  for (int i = 0; i < 300; ++i) {
    // The kept bytes differ from the source's, which tells where a read got its own from.
    const std::string stored(200, 's');
    const std::string kept(200, 'k');
    std::string both = stored;
    std::vector<KeptRange> ranges;
    for (int64_t at = random.between(0, 30); at < 180; at += random.between(0, 40)) {
      const int64_t end = std::min<int64_t>(at + random.between(1, 30), 200);
      ranges.push_back({at, end, bytes_of(kept) + at});
      both.replace(static_cast<size_t>(at), static_cast<size_t>(end - at), static_cast<size_t>(end - at), 'k');
      at = end;
    }
    KeptSource source(std::make_unique<MemorySource>("x", bytes_of(stored), stored.size()), ranges, nullptr);
    CHECK(source.path() == "x");
    io::IoCounters counters;
    const io::OpenSource open(source);
    REQUIRE(open.get()->size() == 200);
    for (int j = 0; j < 30; ++j) {
      const int64_t begin = random.between(0, 200);
      const auto size = static_cast<size_t>(random.between(0, 200 - begin));
      const std::string expected = both.substr(static_cast<size_t>(begin), size);
      std::string read(size, '?');
      source.read_exactly(read.data(), size, begin, counters);
      REQUIRE(read == expected);
      io::AlignedBuffer buffer;
      const auto* seen = reinterpret_cast<const char*>(source.view(buffer, size, begin, counters));
      REQUIRE(std::string(seen, size) == expected);
      if (size == 0) continue;
      std::string mapped(size, '?');
      io::MappedWindow window;
      const auto copy = [&](const std::byte* from) {
        std::copy_n(from, size, reinterpret_cast<std::byte*>(&mapped[0]));
      };
      // From several places nothing is copied; and a source in memory has no mapping.
      REQUIRE(source.copy_mapped({begin, size, size, {}, copy}, window, counters) == is_one(ranges, begin, size));
      REQUIRE(mapped == (is_one(ranges, begin, size) ? expected : std::string(size, '?')));
      if (size < 2) continue;
      std::string scattered(size, '?');
      std::vector<iovec> vectors = {{scattered.data(), size / 2}, {scattered.data() + size / 2, size - size / 2}};
      source.read_scattered(vectors, begin, counters);
      REQUIRE(scattered == expected);
    }
    CHECK_THROWS_AS(source.read_exactly(nullptr, 1, 200, counters), Error);
  }
}
