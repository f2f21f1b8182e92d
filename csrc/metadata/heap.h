// What a pickle of metadata is unpickled into: flat arrays that refer to each other by index. Objects of torch are
// structs of their fields; tuples, lists and dicts are ranges of cells. Chunks and storage rows, which are nearly all
// of a large file, become columns as soon as their list or dict has them. It takes a small multiple of the file's size,
// and what the file shares is shared here.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "metadata/block_list.h"
#include "metadata/columns.h"
#include "metadata/names.h"
#include "metadata/text.h"
#include "metadata/text_table.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

inline constexpr uint32_t kUnset = UINT32_MAX;

// Nobody writes longer texts into metadata.
inline constexpr size_t kMaxText = (size_t{1} << 20) - 1;

// A list or dict grows by segments of Heap::values: the next segment, the number of items, the items. A dict's items
// are its keys and values in turns.
struct Sequence {
  uint64_t first = 0;
  uint64_t last = 0;
  uint64_t items = 0;
  uint64_t cells = 0;  // of Heap::values that its segments take
};

// The dicts that carry the fields of an object are gone when the object has them, and their places are used again. A
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
  size_t first_attribute = 0;  // in Heap::attributes
  size_t attribute_count = 0;
};
// What the metadata has beyond the fields of torch's class.
struct HeapAttribute {
  uint32_t name = 0;  // index into Heap::texts
  Value value;        // unset if the unpickler skipped it
};
struct Path {
  Global type = Global::kPosixPath;
  Value parts;
};

// Chunks that follow each other in Columns::numbers, the offsets and then the sizes of each.
struct ChunkRun {
  uint64_t start = 0;
  uint64_t count = 0;
  uint32_t dims = 0;
  bool sound = true;  // no number is negative, and no chunk ends beyond what 64 bits count

  uint64_t size() const { return uint64_t{2} * dims * count; }
};

// Texts that the unpickler looks for, with what number they have in Heap::texts.
enum class Known : uint32_t { kFqn, kIndex, kLength, kOffset, kOffsets, kRelativePath, kSizes };
inline constexpr std::array<std::string_view, 7> kKnownTexts = {"fqn",     "index",         "length", "offset",
                                                                "offsets", "relative_path", "sizes"};

// As Tag::kNumbers: where in Columns::numbers a torch.Size is, and of how many dimensions.
inline constexpr int kDimsBits = 7;
inline Value numbers_value(uint64_t position, size_t dims) {
  return Value(Tag::kNumbers, position << kDimsBits | dims);
}

// The transforms of the last row that had any, as the file has them and as a number.
struct RecentTransforms {
  Value value;
  uint64_t items = 0;  // if the value is a list, which may have got more since
  uint32_t code = 0;
};

struct Heap {
  explicit Heap(uint64_t size_of_file) : file_size(size_of_file) {
    ints.push_back(0);
    for (const std::string_view text : kKnownTexts) texts.add(text);
  }

  uint64_t file_size;
  TextTable texts;
  uint32_t last_text = 0;  // the one that was asked for last
  std::string literals;    // opcodes with their arguments, one after the other

  // The columns so far: numbers, rows, transforms. FQNs and files are still numbers of `texts`.
  Columns columns;
  std::vector<ChunkRun> chunk_runs;
  RecentTransforms recent_transforms;

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
  BlockList<HeapAttribute> attributes;

  // The number of a text, which is new if it was not there; kNone if it is not UTF-8.
  uint32_t intern(std::string_view text) {
    // Ranks store the same tensors in the same order.
    const uint32_t next = last_text + 1;
    last_text = next < texts.size() && texts[next] == text ? next : texts.find(text);
    if (last_text == TextTable::kNone && is_utf8(text)) last_text = texts.add(text);
    return last_text;
  }
  std::string_view text(Value value) const { return texts[value.payload()]; }

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
