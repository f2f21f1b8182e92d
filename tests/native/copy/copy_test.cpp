#include "copy/copy.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;

namespace {

constexpr size_t kLine = 64;

// Memory that begins at a line, so that a position in it says how it is aligned.
class Lines {
 public:
  explicit Lines(size_t size) : memory_(size + kLine) {}
  char* data() { return memory_.data() + (kLine - reinterpret_cast<uintptr_t>(memory_.data()) % kLine) % kLine; }

 private:
  std::vector<char> memory_;
};

}  // namespace

TEST_CASE("copy: every alignment of both sides, with all instructions, writes these bytes and no others") {
  const std::vector<size_t> sizes{0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 321, 577};
  constexpr size_t kMost = 577;
  constexpr size_t kSpace = kLine + kMost + kLine;
  Random random(1);
  const std::string bytes = random.bytes(kSpace);
  Lines from(kSpace);
  Lines to(kSpace);
  std::memcpy(from.data(), bytes.data(), kSpace);
  for (const copy::Vectors vectors : copy::runnable_vectors()) {
    CAPTURE(static_cast<int>(vectors));
    for (size_t source = 0; source < kLine; ++source) {
      for (size_t destination = 0; destination < kLine; ++destination) {
        for (const size_t size : sizes) {
          std::memset(to.data(), '#', kSpace);
          copy::stream_rows(vectors, to.data() + destination, 0, from.data() + source, 0, 1, size);
          const bool before = std::all_of(to.data(), to.data() + destination, [](char byte) { return byte == '#'; });
          const bool after =
              std::all_of(to.data() + destination + size, to.data() + kSpace, [](char byte) { return byte == '#'; });
          const bool within = std::memcmp(to.data() + destination, from.data() + source, size) == 0;
          if (!before || !after || !within) FAIL("source ", source, " destination ", destination, " size ", size);
        }
      }
    }
  }
}

TEST_CASE("copy: sizes around the one from which the cache is passed") {
  Random random(2);
  const size_t most = copy::kStreamedBytes + 300;
  const std::string bytes = random.bytes(most + kLine);
  for (const size_t size : {copy::kStreamedBytes - 1, copy::kStreamedBytes, copy::kStreamedBytes + 1, most - 1}) {
    for (const size_t destination : {size_t{0}, size_t{1}, size_t{63}}) {
      std::string to(most + 2 * kLine, '#');
      copy::copy_bytes(to.data() + destination, bytes.data() + 13, size);
      REQUIRE(to.compare(destination, size, bytes, 13, size) == 0);
      REQUIRE(to.substr(0, destination) == std::string(destination, '#'));
      REQUIRE(to.substr(destination + size) == std::string(to.size() - destination - size, '#'));
    }
  }
}

TEST_CASE("copy: rows with strides of either sign, small and large") {
  struct Shape {
    size_t rows;
    size_t size;
    std::ptrdiff_t from_stride;
    std::ptrdiff_t to_stride;
  };
  const std::vector<Shape> shapes{
      {0, 100, 128, 128},      {3, 0, 8, 8},        {1, 5, 0, 0},          {7, 3, 5, 4},          {9, 100, 0, 101},
      {5, 256, 300, -256},     {5, 260, -300, 260}, {1500, 300, 301, 333}, {1024, 256, 256, 256}, {1023, 256, 256, 257},
      {64, 4097, -4099, -4101}};
  Random random(3);
  for (const Shape& shape : shapes) {
    CAPTURE(shape.rows);
    CAPTURE(shape.size);
    const auto rows = static_cast<std::ptrdiff_t>(shape.rows);
    const auto span = [&](std::ptrdiff_t stride) {
      return static_cast<size_t>(std::max<std::ptrdiff_t>(rows - 1, 0) * std::abs(stride)) + shape.size;
    };
    const auto begin = [&](std::ptrdiff_t stride) {
      return stride < 0 ? std::max<std::ptrdiff_t>(rows - 1, 0) * -stride : std::ptrdiff_t{0};
    };
    const std::string from = random.bytes(span(shape.from_stride) + 1);
    std::string expected(span(shape.to_stride) + 7, '#');
    for (std::ptrdiff_t row = 0; row < rows; ++row) {
      std::memcpy(expected.data() + 3 + begin(shape.to_stride) + row * shape.to_stride,
                  from.data() + begin(shape.from_stride) + row * shape.from_stride, shape.size);
    }
    const auto check = [&](const auto& copy_rows) {
      std::string to(expected.size(), '#');
      copy_rows(to.data() + 3 + begin(shape.to_stride), from.data() + begin(shape.from_stride));
      REQUIRE(to == expected);
    };
    check([&](char* to, const char* source) {
      copy::copy_rows(to, shape.to_stride, source, shape.from_stride, shape.rows, shape.size);
    });
    for (const copy::Vectors vectors : copy::runnable_vectors()) {
      check([&](char* to, const char* source) {
        copy::stream_rows(vectors, to, shape.to_stride, source, shape.from_stride, shape.rows, shape.size);
      });
    }
  }
}
