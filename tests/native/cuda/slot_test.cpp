#include "cuda/slot.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "doctest/doctest.h"
#include "strided.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using cuda::BoxCopy;
using cuda::BoxDim;
using cuda::SlotPacker;
using cuda::SlotPlan;

namespace {

// What the kernel is to do, the slow and obvious way.
void place_boxes(const std::byte* slot, const SlotPlan& plan) {
  for (size_t e = 0; e < plan.entries.size(); ++e) {
    BoxCopy entry{};
    std::memcpy(&entry, slot + plan.entries_offset() + e * sizeof entry, sizeof entry);
    for (uint64_t vector = entry.first; vector < uint64_t{entry.first} + entry.count; ++vector) {
      int64_t offset = 0;
      uint64_t rest = vector;
      for (uint32_t d = entry.dim_count; d-- > 0;) {
        BoxDim dim{};
        std::memcpy(&dim, slot + entry.dims + d * sizeof dim, sizeof dim);
        offset += static_cast<int64_t>(rest % dim.size) * dim.stride;
        rest /= dim.size;
      }
      if (entry.dim_count == 0) offset = static_cast<int64_t>(vector * entry.vector_bytes);
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      auto* destination = reinterpret_cast<std::byte*>(entry.destination) + offset;
      REQUIRE(reinterpret_cast<uint64_t>(destination) % entry.vector_bytes == 0);
      std::memcpy(destination, slot + entry.source + vector * entry.vector_bytes, entry.vector_bytes);
    }
  }
  for (const cuda::StraightCopy& copy : plan.straight) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    std::memcpy(reinterpret_cast<std::byte*>(copy.destination), slot + copy.offset, copy.bytes);
  }
}

box::Loops packed(box::Loops loops) {
  int64_t stride = 1;
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    loop->destination_stride = stride;
    stride *= loop->size;
  }
  return loops;
}

struct Box {
  box::Loops loops;
  const std::byte* source;
  std::byte* destination;
};

uint64_t address(const std::byte* place) { return reinterpret_cast<uint64_t>(place); }

// Boxes lie one after another, without gaps, and are placed from there.
void place_from_device(const std::vector<Box>& boxes, SlotPlan plan) {
  const auto bytes_of = [](const Box& box) { return static_cast<size_t>(box::volume(box.loops)); };
  size_t all = 0;
  for (const Box& box : boxes) all += bytes_of(box);
  std::vector<std::byte> there(all);
  std::vector<cuda::DeviceAddress> sources;
  std::vector<uint32_t> sizes;
  std::byte* at = there.data();
  for (const Box& box : boxes) {
    const box::Loops loops = packed(box.loops);
    box::copy(at, box.source, loops.data(), loops.size());
    sources.push_back(address(at));
    sizes.push_back(static_cast<uint32_t>(bytes_of(box)));
    at += bytes_of(box);
  }
  plan.take_from_device(sources, sizes);
  CHECK(plan.is_from_device());
  CHECK(plan.straight.empty());
  std::vector<std::byte> staging(plan.staged_bytes, std::byte{0xEE});
  const auto copy = [](uint64_t destination, const cuda::DeviceCopy& from) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    std::memcpy(reinterpret_cast<void*>(destination), reinterpret_cast<void*>(from.source), from.bytes);
  };
  for (const cuda::DeviceCopy& box : plan.to_staging) {
    REQUIRE(box.destination + box.bytes <= plan.descriptors);
    copy(address(staging.data()) + box.destination, box);
  }
  for (const cuda::DeviceCopy& box : plan.to_place) copy(box.destination, box);
  plan.write_descriptors(staging.data());
  place_boxes(staging.data(), plan);
}

}  // namespace

TEST_CASE("slot: packed boxes arrive where a plain copy would put them") {
  for (uint64_t seed = 0; seed < 150; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const int64_t itemsize = random.pick(std::vector<int64_t>{1, 2, 4, 8, 16});
    std::vector<Box> boxes(random.below(12) + 1);
    std::vector<Ints> all_sizes;
    std::vector<Ints> all_strides;
    int64_t source_bytes = 0;
    int64_t destination_bytes = 0;
    std::vector<std::pair<int64_t, int64_t>> starts;
    for (Box& box : boxes) {
      Ints sizes = random_sizes(random, random.below(6), 1, 7);
      if (random.chance(20)) sizes = {random.between(1, 300000)};
      const Ints source_strides = random_strides(random, sizes);
      const Ints destination_strides = random_strides(random, sizes);
      box.loops = box::collapse(sizes, source_strides, destination_strides, itemsize);
      starts.emplace_back(source_bytes, destination_bytes);
      source_bytes += span_of(sizes, source_strides) * itemsize;
      destination_bytes += (span_of(sizes, destination_strides) + random.between(0, 2)) * itemsize;
    }
    const std::string source = random.bytes(static_cast<size_t>(source_bytes));
    std::string expected(static_cast<size_t>(destination_bytes), '#');
    std::string actual = expected;
    for (size_t i = 0; i < boxes.size(); ++i) {
      boxes[i].source = reinterpret_cast<const std::byte*>(source.data()) + starts[i].first;
      boxes[i].destination = reinterpret_cast<std::byte*>(actual.data()) + starts[i].second;
      box::copy(reinterpret_cast<std::byte*>(expected.data()) + starts[i].second, boxes[i].source,
                boxes[i].loops.data(), boxes[i].loops.size());
    }

    constexpr size_t kCapacity = 64 << 20;
    SlotPacker packer(kCapacity);
    for (const Box& box : boxes) REQUIRE(packer.add(box.loops, address(box.destination)));
    const SlotPlan plan = packer.finish();
    CHECK(packer.empty());
    place_from_device(boxes, plan);
    CHECK(actual == expected);
    std::fill(actual.begin(), actual.end(), '#');
    REQUIRE(plan.bytes <= kCapacity);
    REQUIRE(plan.offsets.size() == boxes.size());
    std::vector<std::byte> slot(plan.bytes, std::byte{0xEE});
    for (size_t i = 0; i < boxes.size(); ++i) {
      CHECK(plan.offsets[i] % 16 == 0);
      const box::Loops loops = packed(boxes[i].loops);
      box::copy(slot.data() + plan.offsets[i], boxes[i].source, loops.data(), loops.size());
    }
    plan.write_descriptors(slot.data());
    place_boxes(slot.data(), plan);
    CHECK(actual == expected);
  }
}

TEST_CASE("slot: a large contiguous box is copied straight, all others travel together") {
  constexpr uint64_t base = 4096;
  SlotPacker packer(1 << 20);
  const auto bytes = [](int64_t size) { return box::Loops{{size, 1, 1}}; };
  REQUIRE(packer.add(bytes(100), base));
  REQUIRE(packer.add(bytes(cuda::kMinStraightBytes), base + 1000));
  REQUIRE(packer.add({{2, 500, 100}, {50, 1, 1}}, base));
  REQUIRE(packer.add(bytes(cuda::kMinStraightBytes - 1), base));
  const SlotPlan plan = packer.finish();
  REQUIRE(plan.straight.size() == 1);
  CHECK(plan.straight[0].offset == plan.offsets[1]);
  CHECK(plan.straight[0].offset >= plan.staged_bytes);
  CHECK(plan.straight[0].bytes == cuda::kMinStraightBytes);
  CHECK(plan.straight[0].destination == base + 1000);
  CHECK(plan.entries.size() == 1 + 1 + 2);
  CHECK(plan.dims.size() == 2);
}

TEST_CASE("slot: a box with gaps on the source side only is contiguous in its destination") {
  SlotPacker packer(1 << 20);
  REQUIRE(packer.add({{1024, 4096, 512}, {512, 1, 1}}, 1 << 20));
  const SlotPlan plan = packer.finish();
  CHECK(plan.straight.size() == 1);
  CHECK(plan.entries.empty());
  CHECK(plan.staged_bytes == 0);
}

TEST_CASE("slot: a few small contiguous boxes need no launch, many do, and so does one that is strided") {
  const auto plan_of = [](int small, bool strided) {
    SlotPacker packer(1 << 20);
    for (int i = 0; i < small; ++i) REQUIRE(packer.add({{100, 1, 1}}, 4096));
    if (strided) REQUIRE(packer.add({{2, 500, 100}, {50, 1, 1}}, 8192));
    return packer.finish();
  };
  CHECK(plan_of(cuda::kFewCopies, false).entries.empty());
  CHECK(plan_of(cuda::kFewCopies, false).straight.size() == cuda::kFewCopies);
  CHECK(plan_of(cuda::kFewCopies + 1, false).straight.empty());
  CHECK(plan_of(1, true).straight.empty());
}

TEST_CASE("slot: neighbours in the slot and in the destination are one copy") {
  constexpr int64_t kBytes = 100000;  // a multiple of the alignment of boxes
  const auto copies = [](int64_t bytes, uint64_t gap) {
    SlotPacker packer(1 << 20);
    for (uint64_t i = 0; i < 4; ++i) {
      REQUIRE(packer.add({{bytes, 1, 1}}, 4096 + i * (static_cast<uint64_t>(bytes) + gap)));
    }
    return packer.finish().straight;
  };
  REQUIRE(copies(kBytes, 0).size() == 1);
  CHECK(copies(kBytes, 0)[0].bytes == 4 * kBytes);
  CHECK(copies(kBytes, 0)[0].destination == 4096);
  CHECK(copies(kBytes, 16).size() == 4);
  CHECK(copies(kBytes + 1, 0).size() == 4);
}

TEST_CASE("slot: vectors are as wide as every address and stride allows") {
  struct Case {
    box::Loops loops;
    uint64_t destination;
    uint32_t vector_bytes;
  };
  const std::vector<Case> cases = {
      {{{64, 1, 1}}, 4096, 16},
      {{{64, 1, 1}}, 4096 + 8, 8},
      {{{63, 1, 1}}, 4096, 1},
      {{{62, 1, 1}}, 4096 + 4, 2},
      {{{3, 1000, 256}, {64, 1, 1}}, 4096, 16},
      {{{3, 1000, 260}, {64, 1, 1}}, 4096, 4},
      {{{3, 1000, 256}, {24, 1, 1}}, 4096, 8},
      {{{5, 9000, 1024}, {3, 1000, 130}, {64, 1, 1}}, 4096, 2},
  };
  for (const Case& c : cases) {
    SlotPacker packer(1 << 20);
    REQUIRE(packer.add(c.loops, c.destination));
    REQUIRE(packer.add({{2, 500, 100}, {50, 1, 1}}, 8192));  // lest a box alone be copied straight
    CHECK(packer.finish().entries.at(0).vector_bytes == c.vector_bytes);
  }
}

TEST_CASE("slot: what does not fit any more is refused, and the capacity is used") {
  constexpr size_t kCapacity = 100000;
  SlotPacker packer(kCapacity);
  size_t boxes = 0;
  while (packer.add({{1000, 1, 1}}, 4096)) ++boxes;
  const SlotPlan plan = packer.finish();
  CHECK(plan.bytes <= kCapacity);
  CHECK(plan.bytes + 1000 + 16 + sizeof(BoxCopy) > kCapacity);
  CHECK(plan.entries.size() == boxes);
  CHECK_FALSE(packer.add({{100001, 1, 1}}, 4096));
  CHECK(packer.empty());
}

TEST_CASE("slot: boxes for direct reads lie as in their file, in pages of their own") {
  SlotPacker packer(8 << 20);
  const auto bytes = [](int64_t size) { return box::Loops{{size, 1, 1}}; };
  REQUIRE(packer.add(bytes(100), 4096));
  REQUIRE(packer.add(bytes(100000), 1 << 20, 123));
  REQUIRE(packer.add(bytes(200000), 2 << 20));
  REQUIRE(packer.add(bytes(99999), 3 << 20, 4095));
  REQUIRE(packer.add(bytes(100000), 4 << 20, 0));
  const SlotPlan plan = packer.finish();
  CHECK(plan.offsets[1] % 4096 == 123);
  CHECK(plan.offsets[3] % 4096 == 4095);
  CHECK(plan.offsets[4] % 4096 == 0);
  // From the first to past the last byte that may be written for a box.
  struct Range {
    uint32_t begin;
    uint32_t end;
  };
  const auto pages = [](uint32_t offset, uint32_t size) {
    return Range{offset / 4096 * 4096, (offset + size + 4095) / 4096 * 4096};
  };
  const std::vector<Range> ranges = {{0, plan.staged_bytes},
                                     pages(plan.offsets[1], 100000),
                                     {plan.offsets[2], plan.offsets[2] + 200000},
                                     pages(plan.offsets[3], 99999),
                                     pages(plan.offsets[4], 100000)};
  for (size_t i = 0; i + 1 < ranges.size(); ++i) CHECK(ranges[i].end <= ranges[i + 1].begin);
  CHECK(ranges.back().end <= plan.bytes);
}
