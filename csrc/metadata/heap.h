// What a pickle of metadata is unpickled into: flat arrays that refer to each other by index. Objects of torch are
// structs of their fields; tuples, lists and dicts are ranges of cells. It takes a small multiple of the file's size,
// and what the file shares is shared here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/bytes.h"
#include "metadata/block_list.h"
#include "metadata/names.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

inline constexpr uint32_t kUnset = UINT32_MAX;

// A list or dict grows by segments of Heap::values: the next segment, the number of items, the items. A dict's items
// are its keys and values in turns.
struct Sequence {
  uint64_t first = 0;
  uint64_t last = 0;
  uint64_t items = 0;
  uint64_t cells = 0;  // of Heap::values that its segments take
};

// The dicts that carry the fields of an object are gone when the object has them, and their slots are used again. A
// value from before then has another generation.
struct Dict {
  Sequence sequence;
  uint32_t generation = 0;
};

struct Chunk {
  uint32_t offsets = kUnset;  // both: as Tag::kSize
  uint32_t sizes = kUnset;
};
struct Tensor {
  uint32_t properties = kUnset;
  uint32_t size = kUnset;  // as Tag::kSize
  uint32_t chunks = kUnset;
};
struct Properties {
  uint8_t dtype = 0;
  uint8_t layout = 0;
  MemoryFormat memory_format = MemoryFormat::kContiguous;
  bool requires_grad = false;
  bool pin_memory = false;
  bool of_shard = false;  // of the class Global::kShardTensorProperties
  bool complete = false;
};
struct Index {
  Value fqn;                 // unset until the object has its fields
  uint32_t offset = kUnset;  // as Tag::kSize
  Value index;               // none, or a number
};
struct StorageInfo {
  Value path;  // unset until the object has its fields
  int64_t offset = 0;
  int64_t length = 0;
  Value transforms;  // none, or a list or tuple of texts
};
struct StorageMeta {
  Value checkpoint_id;
  Value save_id;
  Value load_id;
  Value modules;
};
struct Metadata {
  Value entries;
  Value planner_data;
  Value storage_data;
  Value storage_meta;
  Value version;
};
struct Path {
  Global type = Global::kPosixPath;
  Value parts;
};

struct Heap {
  checkpoint::Bytes file;
  std::string decoded;  // texts that the file has in another form

  BlockList<int64_t> ints;  // index 0 holds the empty tuple
  BlockList<Value> values;
  BlockList<Sequence> lists;
  std::vector<Dict> dicts;
  std::vector<uint32_t> free_dicts;

  BlockList<Chunk> chunks;
  BlockList<Tensor> tensors;
  BlockList<Properties> properties;
  BlockList<Index> indices;
  BlockList<StorageInfo> storage_infos;
  BlockList<StorageMeta> storage_metas;
  BlockList<Metadata> metadatas;
  BlockList<Path> paths;

  std::string_view text(Value value) const {
    const Text text = Text::of(value);
    if (text.position >= file.size()) return std::string_view(decoded).substr(text.position - file.size(), text.length);
    return {reinterpret_cast<const char*>(file.data()) + text.position, text.length};
  }

  static bool is_int(Value value) { return value.is(Tag::kInt) || value.is(Tag::kBigInt); }
  int64_t number(Value value) const { return value.is(Tag::kInt) ? value.number() : ints[value.payload()]; }

  size_t tuple_size(Value tuple) const {
    return tuple.is(Tag::kTuple) ? static_cast<size_t>(values[tuple.payload()].payload())
                                 : static_cast<size_t>(ints[tuple.payload()]);
  }
  // Of a Tag::kTuple.
  Value item(Value tuple, size_t i) const { return values[tuple.payload() + 1 + i]; }

  // The dict of a value; null if it was consumed by an object.
  Dict* dict(Value value) {
    Dict& dict = dicts[value.payload() & UINT32_MAX];
    return dict.generation == value.payload() >> 32 ? &dict : nullptr;
  }
};

// Calls visit(item) for the items of a list or dict in order.
template <typename Visit>
void for_each_item(const Heap& heap, const Sequence& sequence, const Visit& visit) {
  uint64_t segment = sequence.first;
  for (uint64_t left = sequence.items; left > 0;) {
    const uint64_t count = heap.values[segment + 1].payload();
    for (uint64_t i = 0; i < count; ++i) visit(heap.values[segment + 2 + i]);
    left -= count;
    segment = heap.values[segment].payload();
  }
}

}  // namespace dcp_fast::metadata
