// Checkpoint files with records of known contents, and what a load of boxes from them must give.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "archive_builder.h"
#include "copy/convert.h"
#include "io/file.h"
#include "strided.h"
#include "temp_dir.h"
#include "transfer/layouts.h"
#include "transfer/program.h"

namespace dcp_fast::testing {

inline bool never() { return false; }

inline transfer::Layouts read_layouts(io::ByteSources sources, const std::vector<transfer::Record>& records,
                                      const std::vector<checkpoint::TensorLayout>& payloads,
                                      const transfer::Options& options) {
  transfer::Layouts layouts = transfer::open_files(std::move(sources), records, payloads, options, never);
  transfer::read_headers(layouts, options, never);
  return layouts;
}

struct CheckpointFiles {
  struct Stored {
    TensorSpec spec;
    std::string storage;
  };

  explicit CheckpointFiles(size_t files) : bytes(files) {}

  size_t add_bytes(size_t file, const std::string& record, bool fallback = false) {
    transfer::Record where;
    where.file = file;
    where.offset = static_cast<int64_t>(bytes[file].size());
    where.length = static_cast<int64_t>(record.size());
    where.fallback = fallback;
    records.push_back(where);
    stored.emplace_back();
    bytes[file] += record;
    return records.size() - 1;
  }
  size_t add(size_t file, const TensorSpec& spec, const std::string& storage, size_t alignment = 64) {
    const size_t index = add_bytes(file, tensor_record(spec, storage, alignment));
    stored[index] = {spec, storage};
    return index;
  }
  // A tensor of these sizes with random bytes, contiguous or strided in any way.
  size_t add_random(Random& random, size_t file, checkpoint::DType dtype, const Ints& sizes, bool contiguous) {
    TensorSpec spec;
    spec.dtype = dtype;
    spec.sizes = sizes;
    spec.strides = contiguous ? contiguous_strides(sizes) : random_strides(random, sizes);
    spec.storage_offset = contiguous ? 0 : random.between(0, 9);
    spec.storage_elements = spec.storage_offset + span_of(sizes, spec.strides);
    const auto storage = random.bytes(static_cast<size_t>(spec.storage_elements * itemsize(spec)));
    return add(file, spec, storage, random.chance(80) ? 64 : 1024);
  }
  void write() {
    paths.clear();
    for (size_t i = 0; i < bytes.size(); ++i) paths.push_back(dir.write(std::to_string(i) + ".distcp", bytes[i]));
  }
  transfer::Layouts layouts(const transfer::Options& options, io::IoMode mode = io::IoMode::kAuto,
                            io::Readers readers = io::Readers::kThisRank) const {
    io::ByteSources sources;
    for (const std::string& path : paths) sources.push_back(std::make_unique<io::File>(path, mode, readers));
    return read_layouts(std::move(sources), records, {}, options);
  }

  TempDir dir;
  std::vector<std::string> bytes;
  std::vector<std::string> paths;
  std::vector<transfer::Record> records;
  std::vector<Stored> stored;
};

// Element by element, as narrow and copy_ do it. Of two dtypes, the engine must know how to convert between them.
// `on_device`: bools go to devices as they are stored.
inline void copy_item(const CheckpointFiles& files, const transfer::Item& item, const transfer::Destination& to,
                      bool on_device = false) {
  const CheckpointFiles::Stored& from = files.stored[item.record];
  const int64_t size = itemsize(from.spec);
  const int64_t source_start = from.spec.storage_offset + dot(item.storage_offsets, from.spec.strides);
  const int64_t destination_start = dot(item.destination_offsets, to.strides);
  const auto conversion = copy::find_conversion(from.spec.dtype, to.dtype, false);
  const box::Dim element{size, 1, 1};
  for_each_index(item.lengths, [&](const Ints& index) {
    const char* source = from.storage.data() + (source_start + dot(index, from.spec.strides)) * size;
    const int64_t position = destination_start + dot(index, to.strides);
    if (conversion && !(on_device && conversion->same_dtype)) {
      copy::convert_box(*conversion, to.data + position * conversion->to_bytes,
                        reinterpret_cast<const std::byte*>(source), &element, 1);
    } else {
      std::memcpy(to.data + position * size, source, static_cast<size_t>(size));
    }
  });
}

// A box that fits both a stored tensor and a destination of as many dimensions.
inline transfer::Item random_item(Random& random, const Ints& stored, const Ints& wanted, size_t record,
                                  size_t destination) {
  transfer::Item item;
  item.record = record;
  item.destination = destination;
  for (size_t dim = 0; dim < stored.size(); ++dim) {
    const int64_t most = std::min(stored[dim], wanted[dim]);
    const int64_t length = random.chance(40) ? most : random.between(most == 0 || random.chance(10) ? 0 : 1, most);
    item.lengths.push_back(length);
    item.storage_offsets.push_back(random.between(0, stored[dim] - length));
    item.destination_offsets.push_back(random.between(0, wanted[dim] - length));
  }
  return item;
}

}  // namespace dcp_fast::testing
