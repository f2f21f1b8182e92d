#include "copy/populate.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "doctest/doctest.h"

using namespace dcp_fast;

namespace {

const auto kPage = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
constexpr size_t kPages = 64;

// Pages that nobody has touched.
class FreshPages {
 public:
  FreshPages()
      : data_(static_cast<std::byte*>(
            ::mmap(nullptr, kPages * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    REQUIRE(data_ != MAP_FAILED);
    ::madvise(data_, kPages * kPage, MADV_NOHUGEPAGE);  // else one touch brings all of them
  }
  ~FreshPages() { ::munmap(data_, kPages * kPage); }
  FreshPages(const FreshPages&) = delete;
  FreshPages& operator=(const FreshPages&) = delete;

  std::byte* at(size_t position) { return data_ + position; }
  std::vector<size_t> present() const {
    std::vector<unsigned char> there(kPages);
    REQUIRE(::mincore(data_, kPages * kPage, there.data()) == 0);
    std::vector<size_t> pages;
    for (size_t page = 0; page < kPages; ++page) {
      if ((there[page] & 1) != 0) pages.push_back(page);
    }
    return pages;
  }

 private:
  std::byte* data_;
};

bool can_populate() {
  FreshPages pages;
  // MADV_POPULATE_WRITE, of Linux 5.14. Emulators of other processors take it for advice that needs not be followed.
  return ::madvise(pages.at(0), kPage, 23) == 0 && pages.present().size() == 1;
}

}  // namespace

TEST_CASE("populate: pages that a range touches are there, and no others") {
  FreshPages pages;
  const size_t first = 3;
  const size_t last = 40;
  copy::populate(pages.at(first * kPage + 100), (last - first) * kPage + 1 - 100);
  std::vector<size_t> expected;
  for (size_t page = first; can_populate() && page <= last; ++page) expected.push_back(page);
  CHECK(pages.present() == expected);
}

TEST_CASE("populate: what is there stays, whether or not the rest comes") {
  constexpr size_t middle = kPages / 2 - 1;  // the range ends within the last page
  for (const size_t touched : {size_t{0}, middle, kPages - 1}) {
    FreshPages pages;
    *pages.at(touched * kPage + 5) = std::byte{7};
    copy::populate(pages.at(1), kPages * kPage - 2);
    CHECK(*pages.at(touched * kPage + 5) == std::byte{7});
    // The middle tells of all.
    const bool comes = touched != middle && can_populate();
    CHECK(pages.present().size() == (comes ? kPages : 1));
  }
}

TEST_CASE("populate: memory that cannot be written is left alone") {
  FreshPages pages;
  ::mprotect(pages.at(0), kPages * kPage, PROT_READ);
  copy::populate(pages.at(0), kPages * kPage);
  CHECK(pages.present().empty());
  copy::populate(pages.at(0), 0);
  CHECK(pages.present().empty());
}
