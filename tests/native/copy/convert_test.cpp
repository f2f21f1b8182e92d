#include "copy/convert.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "copy/copy.h"
#include "copy/formats.h"
#include "doctest/doctest.h"
#include "random.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using checkpoint::dtype_by_name;

namespace {

constexpr size_t kLine = 64;

const std::vector<std::string> kInts{"int8", "uint8", "int16", "int32", "int64"};
const std::vector<std::string> kFloats{"float32",       "float64",         "float16",     "bfloat16",
                                       "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"};

std::vector<std::string> all_dtypes() {
  std::vector<std::string> all = kInts;
  all.insert(all.end(), kFloats.begin(), kFloats.end());
  return all;
}

int64_t itemsize(const std::string& dtype) { return checkpoint::info(dtype_by_name(dtype)).itemsize; }

// Converts elements that are `from_stride` and `to_stride` bytes apart, with '#' around and between them.
std::string converted(const copy::Conversion& conversion, const std::string& from, size_t count, int64_t from_stride,
                      int64_t to_stride) {
  std::string to(static_cast<size_t>(to_stride) * count, '#');
  const std::vector<box::Dim> loops{{static_cast<int64_t>(count), from_stride, to_stride},
                                    {conversion.from_bytes, 1, 1}};
  copy::convert_box(conversion, reinterpret_cast<std::byte*>(to.data()),
                    reinterpret_cast<const std::byte*>(from.data()), loops.data(), loops.size());
  return to;
}

uint64_t element(const std::string& bytes, size_t position, int64_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, bytes.data() + position, static_cast<size_t>(size));
  return bits;
}

// Patterns of a dtype, one after another: all of them up to 16 bits; else random ones, and those around every change of
// the exponent, of the bits that rounding looks at, and of what smaller formats can hold.
std::string patterns(const std::string& dtype) {
  const auto size = static_cast<size_t>(itemsize(dtype));
  std::vector<uint64_t> bits;
  if (size <= 2) {
    for (uint64_t i = 0; i < (uint64_t{1} << (8 * size)); ++i) bits.push_back(i);
  } else {
    Random random(size);
    for (int i = 0; i < 5000; ++i) bits.push_back(element(random.bytes(8), 0, 8));
    const auto around = [&](uint64_t middle) {
      for (const uint64_t off : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}}) bits.push_back(middle + off);
    };
    for (int i = 0; i < 8 * static_cast<int>(size); ++i) {
      around(uint64_t{1} << i);
      around(0 - (uint64_t{1} << i));
    }
    // The values of smaller formats, what is halfway between them, and their neighbours.
    for (const std::string small : {"float16", "bfloat16", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}) {
      const std::vector<double> values = formats::finite_values(small);
      const size_t step = values.size() > 2000 ? 13 : 1;
      for (size_t i = 0; i + 1 < values.size(); i += step) {
        for (const double value : {values[i], (values[i] + values[i + 1]) / 2}) {
          if (dtype == "float32") around(formats::bits_of(static_cast<float>(value)));
          if (dtype == "float64") around(formats::bits_of(value));
          if (dtype == "float32") around(formats::bits_of(-static_cast<float>(value)));
        }
      }
    }
  }
  std::string result;
  for (const uint64_t each : bits) result.append(reinterpret_cast<const char*>(&each), size);
  return result;
}

}  // namespace

TEST_CASE("convert: every pair gives what the definition of its formats says, with all instructions") {
  for (const std::string& from : all_dtypes()) {
    const std::string source = patterns(from);
    const int64_t from_bytes = itemsize(from);
    const size_t count = source.size() / static_cast<size_t>(from_bytes);
    std::string spread(source.size() * 2, '#');
    for (size_t i = 0; i < count; ++i) {
      const size_t size = static_cast<size_t>(from_bytes);
      std::memcpy(&spread[i * 2 * size], &source[i * size], size);
    }
    for (const std::string& to : all_dtypes()) {
      const int64_t to_bytes = itemsize(to);
      const formats::Converter converter(from, to);
      std::map<bool, std::string> first;  // what the first instructions gave
      for (const copy::Vectors vectors : copy::runnable_vectors()) {
        for (const bool contiguous : {false, true}) {
          const auto conversion = copy::find_conversion(dtype_by_name(from), dtype_by_name(to), contiguous, vectors);
          if (!conversion) continue;
          CAPTURE(static_cast<int>(vectors));
          const std::string got = contiguous ? converted(*conversion, source, count, from_bytes, to_bytes)
                                             : converted(*conversion, spread, count, 2 * from_bytes, 3 * to_bytes);
          if (!first[contiguous].empty()) {
            REQUIRE(got == first[contiguous]);
            continue;
          }
          first[contiguous] = got;
          const int64_t stride = contiguous ? to_bytes : 3 * to_bytes;
          // NaNs of bfloat16 depend on the processor, as torch's do.
          const bool ones = to == "bfloat16" && contiguous && (from == "float32" || from == "float64") &&
                            copy::runnable_vectors().size() > 2;
          for (size_t i = 0; i < count; ++i) {
            const size_t at = i * static_cast<size_t>(stride);
            const uint64_t before = element(source, i * static_cast<size_t>(from_bytes), from_bytes);
            const uint64_t after = element(got, at, to_bytes);
            const std::optional<uint64_t> expected = converter(before, ones);
            const bool right = expected ? after == *expected : converter.is_nan(after);
            if (!right) FAIL(from, " ", before, " became ", to, " ", after, " of ", i);
            if (!contiguous && !std::all_of(&got[at + static_cast<size_t>(to_bytes)], &got[at] + 3 * to_bytes,
                                            [](char byte) { return byte == '#'; })) {
              FAIL("bytes between elements were written");
            }
          }
        }
      }
    }
  }
}

TEST_CASE("convert: which pairs there are") {
  const auto exists = [](const std::string& from, const std::string& to) {
    return copy::find_conversion(dtype_by_name(from), dtype_by_name(to), true).has_value();
  };
  for (const std::string& from : all_dtypes()) {
    for (const std::string& to : all_dtypes()) {
      CAPTURE(from);
      CAPTURE(to);
      const bool from_int = std::find(kInts.begin(), kInts.end(), from) != kInts.end();
      const bool to_int = std::find(kInts.begin(), kInts.end(), to) != kInts.end();
      // What of floats does not fit an integer is not defined; what does not fit float8_e4m3fn depends on the torch.
      REQUIRE(exists(from, to) == (from != to && (from_int || !to_int) && to != "float8_e4m3fn"));
    }
  }
  for (const char* rare : {"bool", "complex64", "uint16", "uint64", "float8_e8m0fnu", "bits8"}) {
    REQUIRE(!exists(rare, "float32"));
    REQUIRE(!exists("float32", rare));
  }
  REQUIRE(!copy::find_conversion(checkpoint::kUnknownDType, dtype_by_name("float32"), true));
  REQUIRE(!copy::find_conversion(dtype_by_name("float32"), checkpoint::kUnknownDType, true));
}

TEST_CASE("convert: a bool is 0 or 1, whatever byte stood for it") {
  std::string source(256, '\0');
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<char>(i);
  for (const copy::Vectors vectors : copy::runnable_vectors()) {
    const auto conversion = copy::find_conversion(dtype_by_name("bool"), dtype_by_name("bool"), true, vectors);
    REQUIRE(conversion);
    REQUIRE(conversion->same_dtype);
    const std::string got = converted(*conversion, source, source.size(), 1, 1);
    for (size_t i = 0; i < got.size(); ++i) REQUIRE(got[i] == (i == 0 ? 0 : 1));
  }
  REQUIRE(!copy::find_conversion(dtype_by_name("bool"), dtype_by_name("uint8"), true));
  REQUIRE(!copy::find_conversion(dtype_by_name("uint8"), dtype_by_name("bool"), true));
}

TEST_CASE("convert: every alignment of both sides, and counts around those of vectors and tiles") {
  struct Pair {
    std::string from;
    std::string to;
  };
  // One step and two, widening and narrowing.
  const std::vector<Pair> pairs{{"float32", "bfloat16"}, {"float16", "float32"},     {"bfloat16", "float16"},
                                {"int64", "int8"},       {"float8_e5m2", "float64"}, {"bool", "bool"}};
  const std::vector<size_t> counts{0, 1, 8, 9, 33, 65, 1023, 1025};
  Random random(4);
  for (const Pair& pair : pairs) {
    CAPTURE(pair.from);
    const auto from_bytes = static_cast<size_t>(itemsize(pair.from));
    const auto to_bytes = static_cast<size_t>(itemsize(pair.to));
    for (const copy::Vectors vectors : copy::runnable_vectors()) {
      const auto conversion = copy::find_conversion(dtype_by_name(pair.from), dtype_by_name(pair.to), true, vectors);
      REQUIRE(conversion);
      // Large enough to be written past the cache as well.
      std::vector<size_t> all = counts;
      all.push_back(copy::kStreamedBytes / to_bytes - 1);
      all.push_back(copy::kStreamedBytes / to_bytes + 1);
      for (const size_t count : all) {
        // All alignments where they may matter most; of more elements each with some of the other side.
        const size_t step = count == 9 || count == 65 ? 1 : count < 65 ? 7 : count < 2000 ? 17 : 61;
        const std::string source = random.bytes(count * from_bytes);
        const std::string expected = converted(*conversion, source, count, itemsize(pair.from), itemsize(pair.to));
        std::string from(source.size() + 2 * kLine, '\0');
        std::string to(expected.size() + 3 * kLine, '\0');
        const auto line = [](std::string& bytes) {
          return (kLine - reinterpret_cast<uintptr_t>(bytes.data()) % kLine) % kLine;
        };
        for (size_t i = 0; i < kLine; ++i) {
          for (size_t j = i % step; j < kLine; j += step) {
            const size_t source_at = line(from) + i;
            const size_t at = line(to) + j;
            std::memcpy(&from[source_at], source.data(), source.size());
            std::fill(to.begin(), to.end(), '#');
            const std::vector<box::Dim> loops{
                {static_cast<int64_t>(count), conversion->from_bytes, conversion->to_bytes},
                {conversion->from_bytes, 1, 1}};
            copy::convert_box(*conversion, reinterpret_cast<std::byte*>(&to[at]),
                              reinterpret_cast<const std::byte*>(&from[source_at]), loops.data(), loops.size());
            const bool right = to.find_first_not_of('#') >= at && to.compare(at, expected.size(), expected) == 0 &&
                               to.find_first_not_of('#', at + expected.size()) == std::string::npos;
            if (!right) {
              FAIL("source at ", i, " destination at ", j, " count ", count);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("convert: boxes of any shape and strides, with a count of loops from none to four") {
  Random random(5);
  const std::vector<std::string> dtypes = all_dtypes();
  for (int round = 0; round < 600; ++round) {
    const std::string from = random.pick(dtypes);
    const std::string to = random.pick(dtypes);
    const auto conversion = copy::find_conversion(dtype_by_name(from), dtype_by_name(to), false);
    if (!conversion) continue;
    const auto dims = static_cast<size_t>(random.between(0, 4));
    std::vector<int64_t> sizes;
    int64_t most = 1500;  // elements
    for (size_t dim = 0; dim < dims; ++dim) {
      sizes.push_back(random.between(1, random.pick<int64_t>({3, std::min<int64_t>(40, most), most})));
      most = std::max<int64_t>(1, most / sizes.back());
    }
    // Each side has its dimensions in an order of its own, and gaps at some of them.
    const auto strides = [&](int64_t bytes, int64_t& span) {
      std::vector<size_t> order(dims);
      for (size_t dim = 0; dim < dims; ++dim) order[dim] = dim;
      if (random.chance(60)) random.shuffle(order);
      std::vector<int64_t> result(dims);
      int64_t stride = bytes * (random.chance(30) ? 2 : 1);
      for (const size_t dim : order) {
        result[dim] = stride;
        stride = stride * sizes[dim] + (random.chance(30) ? bytes * random.between(1, 3) : 0);
      }
      span = stride + bytes;
      return result;
    };
    int64_t from_span = 0;
    int64_t to_span = 0;
    const std::vector<int64_t> from_strides = strides(conversion->from_bytes, from_span);
    const std::vector<int64_t> to_strides = strides(conversion->to_bytes, to_span);
    std::vector<box::Dim> loops;
    for (size_t dim = 0; dim < dims; ++dim) loops.push_back({sizes[dim], from_strides[dim], to_strides[dim]});
    loops.push_back({conversion->from_bytes, 1, 1});
    const std::string source = random.bytes(static_cast<size_t>(from_span));
    std::string expected(static_cast<size_t>(to_span), '#');
    std::string got = expected;
    std::vector<int64_t> index(dims, 0);
    for (bool more = true; more;) {
      int64_t at = 0;
      int64_t to_at = 0;
      for (size_t dim = 0; dim < dims; ++dim) {
        at += index[dim] * from_strides[dim];
        to_at += index[dim] * to_strides[dim];
      }
      const box::Dim one{conversion->from_bytes, 1, 1};
      copy::convert_box(*conversion, reinterpret_cast<std::byte*>(&expected[static_cast<size_t>(to_at)]),
                        reinterpret_cast<const std::byte*>(&source[static_cast<size_t>(at)]), &one, 1);
      more = false;
      for (size_t dim = dims; dim-- > 0 && !more;) {
        more = ++index[dim] < sizes[dim];
        if (!more) index[dim] = 0;
      }
    }
    copy::convert_box(*conversion, reinterpret_cast<std::byte*>(got.data()),
                      reinterpret_cast<const std::byte*>(source.data()), loops.data(), loops.size());
    CAPTURE(from);
    CAPTURE(to);
    REQUIRE(got == expected);
  }
}
