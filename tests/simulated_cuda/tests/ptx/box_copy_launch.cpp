#include "box_copy_launch.h"

#include <algorithm>
#include <exception>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "instruction_kernel.h"

using dcp_fast::cuda::BoxCopy;
using dcp_fast::cuda::BoxDim;
using dcp_fast::testing::Random;

namespace simcuda::testing {

namespace {

uint64_t offset_of(const Box& box, uint64_t vector) {
  if (box.dims.empty()) return vector * box.vector_bytes;
  uint64_t offset = 0;
  for (auto dim = box.dims.rbegin(); dim != box.dims.rend(); ++dim) {
    offset += vector % dim->size * static_cast<uint64_t>(dim->stride);
    vector /= dim->size;
  }
  return offset;
}

// Bytes from a box's first one to past its last one in the destination.
uint64_t span_of(const Box& box) {
  if (box.dims.empty()) return uint64_t{box.vectors} * box.vector_bytes;
  uint64_t last = 0;
  for (const BoxDim& dim : box.dims) last += (dim.size - 1) * static_cast<uint64_t>(dim.stride);
  return last + box.vector_bytes;
}

uint32_t aligned(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// Dimensions whose elements do not overlap: any order but for the innermost, sometimes with gaps.
std::vector<BoxDim> random_dims(Random& random, uint32_t vector_bytes, int64_t max_vectors) {
  std::vector<BoxDim> dims(random.below(7));
  int64_t left = max_vectors;
  for (BoxDim& dim : dims) {
    const int64_t size = random.between(1, std::min<int64_t>(left, random.pick<int64_t>({1, 3, 7, 40, 1000})));
    left /= size;
    dim = {static_cast<uint32_t>(size), static_cast<uint32_t>(random.below(UINT32_MAX)), 0};
  }
  if (dims.empty()) return dims;
  std::vector<size_t> order(dims.size() - 1);
  std::iota(order.begin(), order.end(), size_t{0});
  random.shuffle(order);
  order.insert(order.begin(), dims.size() - 1);
  int64_t next = vector_bytes;
  for (const size_t i : order) {
    dims[i].stride = next;
    next *= dims[i].size;
    if (random.chance(40)) next += vector_bytes * random.between(1, 9);
  }
  return dims;
}

// The vectors of a box in one entry or several, which the kernel may not care about.
void cut_into_entries(Random& random, size_t box, uint32_t vectors, std::vector<Entry>& entries) {
  for (uint32_t first = 0; first < vectors;) {
    const auto rest = static_cast<int64_t>(vectors - first);
    const auto count = static_cast<uint32_t>(random.chance(50) ? rest : random.between(0, rest));
    entries.push_back({box, first, count});
    first += count;
  }
}

}  // namespace

const char* const kBoxCopyName = "dcp_fast_box_copy";

std::string box_copy_ptx() {
  std::ifstream file(BOX_COPY_PTX);
  if (!file) throw std::runtime_error("cannot open " BOX_COPY_PTX);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

Launch make_launch(Random& random, uint64_t slot, uint32_t descriptors, const std::vector<Box>& boxes,
                   const std::vector<Entry>& entries) {
  Launch launch;
  std::vector<uint32_t> dims_of;
  uint32_t at = descriptors;
  for (const Box& box : boxes) {
    dims_of.push_back(at);
    launch.before.allow(box.destination, span_of(box), Access::kWriteOnce);
    const auto bytes = static_cast<uint32_t>(box.dims.size() * sizeof(BoxDim));
    launch.before.write(slot + at, box.dims.data(), bytes);
    launch.before.allow(slot + at, bytes, Access::kRead);
    at += bytes;
  }
  const uint32_t first_entry = at;
  for (const Entry& entry : entries) {
    const Box& box = boxes[entry.box];
    const BoxCopy copy{box.destination, box.source,         entry.first,
                       entry.count,     dims_of[entry.box], static_cast<uint32_t>(box.dims.size()),
                       box.vector_bytes};
    launch.before.write(slot + at, &copy, sizeof(copy));
    at += sizeof(copy);
    const std::string data = random.bytes(size_t{entry.count} * box.vector_bytes);
    const uint64_t source = slot + box.source + uint64_t{entry.first} * box.vector_bytes;
    launch.before.write(source, data.data(), data.size());
    launch.before.allow(source, data.size(), Access::kRead);
  }
  launch.before.allow(slot + first_entry, at - first_entry, Access::kRead);
  launch.after = launch.before;
  for (const Entry& entry : entries) {
    const Box& box = boxes[entry.box];
    for (uint64_t i = entry.first; i < uint64_t{entry.first} + entry.count; ++i) {
      launch.after.write(box.destination + offset_of(box, i),
                         launch.before.at(slot + box.source + i * box.vector_bytes), box.vector_bytes);
    }
  }
  append(launch.parameters, slot);
  append(launch.parameters, first_entry);
  append(launch.parameters, static_cast<uint32_t>(entries.size()));
  return launch;
}

std::vector<Launch> plain_launches(Random& random) {
  const uint64_t slot = uint64_t{1} << 33;
  const uint64_t destination = uint64_t{1} << 40;
  std::vector<Launch> launches;
  for (const uint32_t bytes : {1, 2, 4, 8, 16}) {
    // Entries that leave threads without work, and some that end within each part of a batch of four vectors a thread.
    const std::vector<Entry> entries{{0, 2800, 0},  {0, 0, 10},    {0, 10, 290},
                                     {0, 300, 600}, {0, 900, 800}, {0, 1700, 1100}};
    for (const std::vector<BoxDim>& dims : std::vector<std::vector<BoxDim>>{
             {},
             {{2800, 0, bytes}},
             {{56, 0, int64_t{51} * bytes}, {50, 0, bytes}},
             {{7, 0, int64_t{45} * bytes}, {10, 0, int64_t{320} * bytes}, {5, 0, int64_t{9} * bytes}, {8, 0, bytes}}}) {
      const Box box{64, destination, 2800, bytes, dims};
      launches.push_back(make_launch(random, slot, 128 + 2800 * bytes, {box}, entries));
      launches.back().grid.x = 2;
    }
  }
  return launches;
}

Launch random_launch(Random& random) {
  std::vector<Box> boxes(1 + random.below(6));
  std::vector<Entry> entries;
  uint32_t used = 0;
  uint64_t next_destination = uint64_t{1} << 40;
  for (size_t i = 0; i < boxes.size(); ++i) {
    Box& box = boxes[i];
    box.vector_bytes = random.pick<uint32_t>({1, 2, 4, 8, 16});
    box.dims = random_dims(random, box.vector_bytes, random.pick<int64_t>({40, 300, 3000}));
    int64_t vectors = random.pick<int64_t>({1, 255, 256, 257, 700, 1024, 1100});
    if (!box.dims.empty()) {
      vectors = 1;
      for (const BoxDim& dim : box.dims) vectors *= dim.size;
    }
    box.source = aligned(used, box.vector_bytes);
    box.vectors = static_cast<uint32_t>(vectors);
    used = box.source + box.vectors * box.vector_bytes;
    box.destination = (next_destination + box.vector_bytes - 1) / box.vector_bytes * box.vector_bytes;
    next_destination = box.destination + span_of(box) + random.below(40);
    cut_into_entries(random, i, box.vectors, entries);
  }
  random.shuffle(entries);
  const uint64_t slot = (uint64_t{1} << 33) + 16 * random.below(100);
  Launch launch =
      make_launch(random, slot, aligned(used, 8) + 8 * static_cast<uint32_t>(random.below(3)), boxes, entries);
  launch.grid.x = static_cast<uint32_t>(random.between(1, static_cast<int64_t>(entries.size()) + 2));
  launch.block.x = random.pick<uint32_t>({1, 7, 32, 64, 96, 256});
  return launch;
}

std::vector<Launch> sparse_launches(Random& random) {
  const uint64_t slot = uint64_t{1} << 36;
  const uint64_t destination = uint64_t{1} << 40;
  const uint32_t descriptors = 0xFFFF0000;
  std::vector<Launch> launches;
  for (const uint32_t bytes : {1, 2, 4, 8, 16}) {
    const auto add = [&](uint32_t source, uint32_t vectors, const std::vector<BoxDim>& dims,
                         const std::vector<Entry>& entries) {
      const Box box{source, destination, vectors, bytes, dims};
      launches.push_back(make_launch(random, slot, descriptors, {box}, entries));
    };
    // Destinations far apart, the vectors of the box few.
    const uint32_t far_source = 0xFFF00000;
    add(far_source, 105, {{3, 0, int64_t{9} << 30}, {5, 0, int64_t{1} << 30}, {7, 0, bytes}}, {{0, 0, 105}});
    add(far_source, 126, {{3, 0, (int64_t{1} << 33) + bytes * 7}, {2, 0, bytes * 21}, {21, 0, bytes}}, {{0, 3, 100}});
    add(far_source, 105, {}, {{0, 0, 105}});
    add(far_source, 6, {{2, 0, bytes}, {3, 0, int64_t{3} << 31}, {1, 0, bytes}}, {{0, 0, 6}});

    // As many vectors as a slot can hold, some of which are copied: full batches at the beginning, middle and end.
    const uint32_t vectors = 4026000000 / bytes;
    const uint32_t some = 1024;
    const std::vector<Entry> entries{{0, 0, some}, {0, vectors / 2 - 100, some}, {0, vectors - some, some}};
    add(16, vectors, {}, entries);
    add(16, vectors, {{vectors, 0, bytes}}, entries);
    add(16, vectors, {{vectors, 0, bytes}, {1, 0, bytes}}, entries);
    add(16, vectors, {{1, 0, int64_t{1} << 34}, {vectors, 0, bytes}}, entries);
    add(16, vectors, {{vectors / 1000, 0, int64_t{1003} * bytes}, {1000, 0, bytes}}, entries);
    add(16, vectors, {{3, 0, int64_t{1} << 33}, {vectors / 3, 0, bytes}}, entries);
  }
  return launches;
}

std::string failure_of(const ptx::Kernel& kernel, const Launch& launch, uint64_t steps_per_thread) {
  SparseMemory memory = launch.before;
  try {
    ptx::run(kernel, launch.grid, launch.block, launch.parameters, memory, steps_per_thread);
  } catch (const std::exception& error) {
    return error.what();
  }
  return memory.same_bytes(launch.after) ? "" : "wrong bytes in memory";
}

}  // namespace simcuda::testing
