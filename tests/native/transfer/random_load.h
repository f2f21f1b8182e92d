// A load of random boxes from random files, into destinations that may share memory, and what must come of it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "checkpoint_files.h"

namespace dcp_fast::testing {

inline std::byte* data_of(std::string& memory) { return reinterpret_cast<std::byte*>(memory.data()); }

inline transfer::Options random_options(Random& random) {
  transfer::Options options;
  options.threads = static_cast<int>(random.between(1, 6));
  options.block_bytes = random.pick(std::vector<int64_t>{0, 1, 70000, 1 << 20});
  options.staging_bytes = random.pick(std::vector<int64_t>{0, 300000, 32 << 20});
  return options;
}

inline io::IoMode random_mode(Random& random) {
  return random.pick(
      std::vector<io::IoMode>{io::IoMode::kAuto, io::IoMode::kCached, io::IoMode::kDirect, io::IoMode::kMapped});
}

struct RandomLoad {
  // Destinations lie in one of several memories. `conversions`: some of them have another dtype than what is stored.
  explicit RandomLoad(Random& random, size_t memories = 1, bool conversions = false)
      : files(random.below(3) + 1), expected(memories) {
    const auto dtype = static_cast<checkpoint::DType>(random.below(checkpoint::kDTypes.size()));
    const size_t dims = random.below(5);
    for (int64_t i = random.between(1, 8); i > 0; --i) {
      files.add_random(random, random.below(files.bytes.size()), dtype, sizes_like(random, dims), random.chance(60));
    }
    files.write();
    for (int64_t i = random.between(1, 4); i > 0; --i) {
      transfer::Destination destination;
      destination.sizes = sizes_like(random, dims);
      destination.strides = random_strides(random, destination.sizes);
      destination.dtype = conversions && random.chance(60) ? random_target(random, dtype) : dtype;
      destination.device = random.chance(85) ? transfer::kHost : transfer::kElsewhere;
      memory_of.push_back(random.below(memories));
      std::string& memory = expected[memory_of.back()];
      const int64_t size = checkpoint::info(destination.dtype).itemsize;
      const auto bytes = static_cast<int64_t>(memory.size());
      starts.push_back(bytes >= size && random.chance(25) ? random.between(0, bytes / size - 1) * size : bytes);
      const int64_t end = starts.back() + span_of(destination.sizes, destination.strides) * size;
      memory.resize(static_cast<size_t>(std::max(bytes, end)), '#');
      destinations.push_back(destination);
    }
    before = expected;
    for (int64_t i = random.between(0, 10); i > 0; --i) {
      const size_t record = random.below(files.records.size());
      const size_t destination = random.below(destinations.size());
      items.push_back(
          random_item(random, files.stored[record].spec.sizes, destinations[destination].sizes, record, destination));
    }
    // In torch's order: file by file.
    for (size_t memory = 0; memory < memories; ++memory) place(memory, data_of(expected[memory]));
    for (size_t file = 0; file < files.bytes.size(); ++file) {
      for (const transfer::Item& item : items) {
        if (files.records[item.record].file != file) continue;
        copy_item(files, item, destinations[item.destination], memory_of[item.destination] != 0);
      }
    }
  }

  // Says where a memory begins.
  void place(size_t memory, std::byte* begin) {
    for (size_t i = 0; i < destinations.size(); ++i) {
      if (memory_of[i] == memory) destinations[i].data = begin + starts[i];
    }
  }

  CheckpointFiles files;
  std::vector<transfer::Destination> destinations;
  std::vector<size_t> memory_of;  // by destination
  std::vector<int64_t> starts;    // likewise
  std::vector<transfer::Item> items;
  std::vector<std::string> before;    // by memory
  std::vector<std::string> expected;  // likewise

 private:
  // A dtype that the engine converts to. Not float to bfloat16, where the bits of a NaN depend on strides.
  static checkpoint::DType random_target(Random& random, checkpoint::DType dtype) {
    const auto target = static_cast<checkpoint::DType>(random.below(checkpoint::kDTypes.size()));
    const bool known = copy::find_conversion(dtype, target, false).has_value();
    return known && checkpoint::info(target).name != "bfloat16" ? target : dtype;
  }

  static Ints sizes_like(Random& random, size_t dims) {
    if (dims == 2 && random.chance(15)) return {random.between(50, 400), random.between(50, 400)};
    if (dims == 1 && random.chance(35)) return {random.between(1000, 150000)};
    return random_sizes(random, dims, random.chance(5) ? 0 : 1, 8);
  }
};

}  // namespace dcp_fast::testing
