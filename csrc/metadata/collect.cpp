#include "metadata/collect.h"

#include <algorithm>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "metadata/failure.h"
#include "metadata/sequences.h"

namespace dcp_fast::metadata {

namespace {

uint64_t add_shape(Heap& heap, uint32_t shape, size_t dims) {
  if (!has_room(heap, dims)) unsupported("shapes that are shared too often");
  std::vector<int64_t>& numbers = heap.columns.numbers;
  const uint64_t start = numbers.size();
  for (size_t i = 0; i < dims; ++i) numbers.push_back(heap.ints[shape + 1 + i]);
  return start;
}

size_t dims_of(const Heap& heap, uint32_t shape) { return static_cast<size_t>(heap.ints[shape]); }

void add_chunk(Heap& heap, const Chunk& chunk, Sequence& list, ChunkRun& run) {
  const size_t dims = dims_of(heap, chunk.offsets);
  if (dims != dims_of(heap, chunk.sizes) || dims > kMaxDims) unsupported("a chunk of such dimensions");
  if (run.count > 0 && run.dims != dims) {
    append_run(heap, list, run);
    run = {};
  }
  const uint64_t offsets = add_shape(heap, chunk.offsets, dims);
  const uint64_t sizes = add_shape(heap, chunk.sizes, dims);
  if (run.count == 0) run.start = offsets;
  run.dims = static_cast<uint32_t>(dims);
  ++run.count;
  const int64_t* numbers = heap.columns.numbers.data();
  run.sound = run.sound && is_sound(numbers + offsets, numbers + sizes, dims);
}

void add_offset(Heap& heap, uint32_t shape) {
  StorageRows& rows = heap.columns.rows;
  const size_t dims = shape == kUnset ? 0 : dims_of(heap, shape);
  if (dims > kMaxDims) unsupported("an offset of more than 64 dimensions");
  rows.dims.push_back(shape == kUnset ? StorageRows::kNoOffset : static_cast<uint32_t>(dims));
  rows.chunk_offset.push_back(shape == kUnset ? 0 : add_shape(heap, shape, dims));
}

// Writers that use transforms use the same few for all entries, so a search in order will do; a file with more of
// them is not theirs.
uint32_t transforms_code(Heap& heap, Value value) {
  constexpr size_t kMaxTransforms = 64;
  constexpr size_t kMaxName = 128;
  // Rows mostly recall the one list. Nothing is ever taken from a list again: with as many items it has the same ones.
  const uint64_t items = value.is(Tag::kList) ? heap.lists[value.payload()].items : 0;
  RecentTransforms& recent = heap.recent_transforms;
  if (recent.value == value && recent.items == items) return recent.code;
  Transforms transforms;
  transforms.is_list = value.is(Tag::kList);
  const auto add = [&](Value name) {
    if (!name.is(Tag::kText)) unsupported("transform descriptors of another type");
    if (transforms.names.size() == kMaxTransforms) unsupported("too many transform descriptors");
    const std::string_view text = heap.text(name);
    if (text.size() > kMaxName) unsupported("a long transform descriptor");
    transforms.names.emplace_back(text);
  };
  if (transforms.is_list) {
    for_each_item(heap, heap.lists[value.payload()], add);
  } else if (value.is(Tag::kTuple)) {
    for (size_t i = 0; i < heap.tuple_size(value); ++i) add(heap.item(value, i));
  } else if (!value.is(Tag::kInts) || heap.tuple_size(value) != 0) {
    unsupported("transform descriptors of another type");
  }
  std::vector<Transforms>& known = heap.columns.transforms;
  const auto found = std::find(known.begin() + 1, known.end(), transforms);
  const auto code = static_cast<uint32_t>(found - known.begin());
  if (found == known.end()) {
    if (known.size() == kMaxTransforms) unsupported("too many different transform descriptors");
    known.push_back(std::move(transforms));
  }
  recent = {value, items, code};
  return code;
}

void add_transforms(Heap& heap, Value value) {
  std::vector<uint32_t>& column = heap.columns.rows.transforms;
  if (value.is(Tag::kNone) && column.empty()) return;
  if (heap.columns.transforms.empty()) heap.columns.transforms.emplace_back();
  column.resize(heap.columns.rows.size() - 1);
  column.push_back(value.is(Tag::kNone) ? 0 : transforms_code(heap, value));
}

void add_row(Heap& heap, const Index& index, const StorageInfo& info) {
  StorageRows& rows = heap.columns.rows;
  if (rows.size() + 1 >= HashTable::kNone) unsupported("more storage entries than 32 bits count");
  rows.fqn.push_back(static_cast<uint32_t>(index.fqn.payload()));
  add_offset(heap, index.offset);
  const int64_t hint = Heap::is_int(index.index) ? heap.number(index.index) : StorageRows::kNoIndex;
  if (Heap::is_int(index.index) && hint == StorageRows::kNoIndex) unsupported("an index out of bounds");
  rows.index.push_back(hint);
  rows.file.push_back(static_cast<uint32_t>(info.path.payload()));
  rows.offset.push_back(info.offset);
  rows.length.push_back(info.length);
  add_transforms(heap, info.transforms);
}

}  // namespace

bool is_sound(const int64_t* offsets, const int64_t* sizes, size_t dims) {
  for (size_t i = 0; i < dims; ++i) {
    if (offsets[i] < 0 || sizes[i] < 0 || sizes[i] > std::numeric_limits<int64_t>::max() - offsets[i]) return false;
  }
  return true;
}

bool collect_chunks(Heap& heap, Sequence& list, const Value* items, size_t count) {
  const auto complete = [&](Value item) { return item.is(Tag::kChunk) && heap.chunks[item.payload()].sizes != kUnset; };
  if (count == 0 || !std::all_of(items, items + count, complete)) return false;
  ChunkRun run;
  for (size_t i = 0; i < count; ++i) add_chunk(heap, heap.chunks[items[i].payload()], list, run);
  append_run(heap, list, run);
  return true;
}

bool collect_rows(Heap& heap, Sequence& dict, const Value* items, size_t count) {
  for (size_t i = 0; i < count; i += 2) {
    if (!items[i].is(Tag::kIndex) || !heap.indices[items[i].payload()].fqn.is(Tag::kText) ||
        !items[i + 1].is(Tag::kStorageInfo) || !heap.storage_infos[items[i + 1].payload()].path.is(Tag::kText)) {
      return false;
    }
  }
  if (count == 0) return false;
  const size_t first = heap.columns.rows.size();
  for (size_t i = 0; i < count; i += 2) {
    add_row(heap, heap.indices[items[i].payload()], heap.storage_infos[items[i + 1].payload()]);
  }
  append_rows(heap, dict, first, count / 2);
  return true;
}

void append_run(Heap& heap, Sequence& list, const ChunkRun& run) {
  const Value value(Tag::kChunks, heap.chunk_runs.size());
  heap.chunk_runs.push_back(run);
  append(heap, list, &value, 1);
}

void append_rows(Heap& heap, Sequence& dict, size_t first, size_t count) {
  const Value pair[] = {Value(Tag::kRows, first), Value::of(static_cast<int64_t>(count))};
  append(heap, dict, pair, 2);
}

}  // namespace dcp_fast::metadata
