// Writes metadata pickles opcode by opcode: what DCP writes, and what it never would.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "random.h"

namespace dcp_fast::testing {

inline constexpr std::string_view kCheckpoint = "torch.distributed.checkpoint.metadata";

inline std::string little_endian(uint64_t value, size_t width) {
  std::string result;
  for (size_t i = 0; i < width; ++i) result += static_cast<char>(value >> (8 * i) & 0xff);
  return result;
}

inline std::string text(std::string_view value) { return "X" + little_endian(value.size(), 4) + std::string(value); }

inline std::string number(int64_t value) { return "\x8a\x08" + little_endian(static_cast<uint64_t>(value), 8); }

inline std::string global(std::string_view module, std::string_view name) {
  return "c" + std::string(module) + "\n" + std::string(name) + "\n";
}

inline std::string object(std::string_view name, std::string_view module = kCheckpoint) {
  return global(module, name) + ")\x81";
}

inline std::string size(const std::vector<int64_t>& numbers) {
  std::string items;
  for (const int64_t value : numbers) items += number(value);
  return global("torch", "Size") + "(" + items + "t\x85R";
}

inline std::string chunk(const std::vector<int64_t>& offsets, const std::vector<int64_t>& sizes) {
  return object("ChunkStorageMetadata") + "}(" + text("offsets") + size(offsets) + text("sizes") + size(sizes) + "ub";
}

inline std::string properties(std::string_view dtype = "float32") {
  return object("TensorProperties") + "(" + global("torch", dtype) + global("torch.serialization", "_get_layout") +
         text("torch.strided") + "\x85R\x89" + global(kCheckpoint, "_MEM_FORMAT_ENCODING") + number(0) + "\x85R\x89tb";
}

// `chunks`: opcodes of the list.
inline std::string tensor(const std::vector<int64_t>& whole, const std::string& chunks) {
  return object("TensorStorageMetadata") + "}(" + text("properties") + properties() + text("size") + size(whole) +
         text("chunks") + chunks + "ub";
}

inline std::string list(const std::vector<std::string>& items) {
  std::string result = "](";
  for (const std::string& item : items) result += item;
  return result + "e";
}

// `offset`: opcodes.
inline std::string index(std::string_view fqn, const std::string& offset) {
  return object("MetadataIndex") + "}(" + text("fqn") + text(fqn) + text("index") + "N" + text("offset") + offset +
         "ub";
}

// `transforms`: opcodes of their field, if any.
inline std::string storage_info(std::string_view path, int64_t offset, int64_t length,
                                const std::string& transforms = "") {
  const std::string field = transforms.empty() ? "" : text("transform_descriptors") + transforms;
  return object("_StorageInfo", "torch.distributed.checkpoint.filesystem") + "}(" + text("relative_path") + text(path) +
         text("offset") + number(offset) + text("length") + number(length) + field + "ub";
}

// All: opcodes. Entries and storage are keys and values in turns.
inline std::string pickle_of(const std::string& entries, const std::string& storage = "",
                             const std::string& planner_data = "N") {
  return "\x80\x04" + object("Metadata") + "}(" + text("state_dict_metadata") + "}(" + entries + "u" +
         text("planner_data") + planner_data + text("storage_data") + "}(" + storage + "uub.";
}

// A small one of all that DCP writes.
inline std::string random_pickle(Random& random) {
  std::string entries;
  std::string storage;
  const auto count = random.between(0, 4);
  for (int64_t i = 0; i < count; ++i) {
    const std::string fqn = "k" + std::to_string(i);
    if (random.chance(20)) {
      entries += text(fqn) + object("BytesStorageMetadata");
      storage += index(fqn, "N") + storage_info("f", 1, 2);
      continue;
    }
    std::vector<int64_t> shape(random.below(4));
    for (int64_t& n : shape) n = random.pick(std::vector<int64_t>{0, 1, 300, int64_t{1} << 40});
    std::vector<std::string> chunks(random.below(3), chunk(shape, shape));
    entries += text(fqn) + tensor(shape, list(chunks));
    storage += index(fqn, size(shape)) + storage_info("g" + std::to_string(i % 2), i, 2, random.chance(30) ? "]" : "");
  }
  const std::vector<std::string> planner_data = {"N", "}" + text("k0") + text("a") + number(1) + "\x86s",
                                                 list({text("a"), "}", ")", number(5)}) + "q\x01h\x01\x86"};
  return pickle_of(entries, storage, random.pick(planner_data));
}

}  // namespace dcp_fast::testing
