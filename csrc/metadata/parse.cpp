#include "metadata/parse.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "metadata/failure.h"
#include "metadata/plain_pickle.h"
#include "metadata/unpickler.h"

namespace dcp_fast::metadata {

namespace {

// torch's own limit for tensors.
constexpr size_t kMaxDims = 64;

class Builder {
 public:
  explicit Builder(Heap& heap) : heap_(heap) {}

  Columns build(Value root) {
    if (!root.is(Tag::kMetadata)) corrupt("the file holds something else than Metadata");
    const Metadata& metadata = heap_.metadatas[root.payload()];
    if (metadata.entries.is(Tag::kUnset)) unsupported("metadata without fields");
    columns_.planner_data = plain_pickle(heap_, metadata.planner_data);
    add_storage_meta(metadata.storage_meta);
    if (metadata.version.is(Tag::kText)) {
      columns_.has_version = true;
      columns_.version = heap_.text(metadata.version);
    }
    add_entries(metadata.entries);
    add_storage(metadata.storage_data);
    return std::move(columns_);
  }

 private:
  // A list of chunks that an entry had before.
  struct AddedList {
    uint64_t start = 0;  // where in `numbers` the chunks are
    uint32_t dims = 0;
    bool done = false;
  };

  void add_storage_meta(Value value) {
    if (value.is(Tag::kUnset) || value.is(Tag::kNone)) return;
    if (!value.is(Tag::kStorageMeta)) unsupported("a storage_meta of another type");
    const StorageMeta& meta = heap_.storage_metas[value.payload()];
    const uint64_t tuple = heap_.values.size();
    heap_.values.push_back(Value::of(int64_t{4}));
    for (const Value field : {meta.checkpoint_id, meta.save_id, meta.load_id, meta.modules}) {
      heap_.values.push_back(field);
    }
    columns_.storage_meta = plain_pickle(heap_, Value(Tag::kTuple, tuple));
  }

  // Entries

  void add_entries(Value value) {
    const Dict* dict = heap_.dict(value);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    columns_.entries.reserve(dict->sequence.items / 2);
    added_lists_.resize(heap_.lists.size());
    columns_.numbers.reserve(heap_.ints.size());  // all shapes are among them
    Value key;
    for_each_item(heap_, dict->sequence, [&](Value item) {
      if (key.is(Tag::kUnset)) {
        key = item;
        return;
      }
      add_entry(key, item);
      key = Value();
    });
    added_lists_ = {};
  }

  void add_entry(Value key, Value value) {
    if (!key.is(Tag::kText)) unsupported("an FQN that is no text");
    const uint32_t fqn = columns_.fqns.add(heap_.text(key));
    if (fqn != columns_.entries.size()) unsupported("an FQN that is there twice");
    Entry entry;
    if (value.is(Tag::kTensor)) {
      add_tensor(heap_.tensors[value.payload()], entry);
    } else if (!value.is(Tag::kBytesEntry)) {
      unsupported("an entry of another type");
    }
    columns_.entries.push_back(entry);
  }

  void add_tensor(const Tensor& tensor, Entry& entry) {
    if (tensor.properties == kUnset) unsupported("an entry without fields");
    const auto dims = static_cast<size_t>(heap_.ints[tensor.size]);
    if (dims > kMaxDims) unsupported("a tensor of more than 64 dimensions");
    const Sequence& chunks = heap_.lists[tensor.chunks];
    if (chunks.items >= kUnset) unsupported("more chunks than 32 bits count");
    entry.kind = EntryKind::kTensor;
    entry.properties = heap_.properties[tensor.properties];
    entry.dims = static_cast<uint32_t>(dims);
    entry.size = add_numbers(tensor.size, dims);
    entry.chunk_count = static_cast<uint32_t>(chunks.items);
    AddedList& added = added_lists_[tensor.chunks];
    // Entries that share their list share the chunks here, lest a small file grow large.
    if (!added.done) {
      added = {columns_.numbers.size(), entry.dims, true};
      for_each_item(heap_, chunks, [&](Value chunk) { add_chunk(chunk, dims); });
    } else if (added.dims != entry.dims) {
      unsupported("tensors of different dimensions that share their chunks");
    }
    entry.chunks = added.start;
  }

  void add_chunk(Value value, size_t dims) {
    if (!value.is(Tag::kChunk)) unsupported("a chunk of another type");
    const Chunk& chunk = heap_.chunks[value.payload()];
    if (chunk.offsets == kUnset || chunk.sizes == kUnset) unsupported("a chunk without fields");
    for (const uint32_t shape : {chunk.offsets, chunk.sizes}) {
      if (static_cast<size_t>(heap_.ints[shape]) != dims) unsupported("a chunk of other dimensions than its tensor");
    }
    const uint64_t offsets = add_numbers(chunk.offsets, dims);
    const uint64_t sizes = add_numbers(chunk.sizes, dims);
    for (size_t i = 0; i < dims; ++i) {
      if (columns_.numbers[sizes + i] > std::numeric_limits<int64_t>::max() - columns_.numbers[offsets + i]) {
        corrupt("a chunk that ends beyond what 64 bits count");
      }
    }
  }

  // Numbers of a shape, which cannot be negative.
  uint64_t add_numbers(uint32_t shape, size_t dims) {
    const uint64_t start = columns_.numbers.size();
    // What is shared in the file is repeated here. No writer shares so much that this would be reached.
    if (start + dims > heap_.file.size()) unsupported("shapes that are shared too often");
    for (size_t i = 0; i < dims; ++i) {
      const int64_t number = heap_.ints[shape + 1 + i];
      if (number < 0) corrupt("a negative offset or size of a chunk");
      columns_.numbers.push_back(number);
    }
    return start;
  }

  // Storage data

  void add_storage(Value value) {
    columns_.has_storage = value.is(Tag::kDict);
    if (value.is(Tag::kNone) || value.is(Tag::kUnset)) return;
    if (!columns_.has_storage) unsupported("storage data of another type");
    const Dict* dict = heap_.dict(value);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    const size_t count = dict->sequence.items / 2;
    if (count >= HashTable::kNone) unsupported("more storage entries than 32 bits count");
    reserve_rows(count);
    Value key;
    for_each_item(heap_, dict->sequence, [&](Value item) {
      if (key.is(Tag::kUnset)) {
        key = item;
        return;
      }
      add_row(key, item);
      key = Value();
    });
    columns_.row_table.reserve(count);
    for (uint32_t row = 0; row < count; ++row) {
      if (!columns_.add_row_to_table(row)) unsupported("a storage entry that is there twice");
    }
  }

  void reserve_rows(size_t count) {
    StorageRows& rows = columns_.rows;
    rows.fqn.reserve(count);
    rows.dims.reserve(count);
    rows.chunk_offset.reserve(count);
    rows.index.reserve(count);
    rows.file.reserve(count);
    rows.offset.reserve(count);
    rows.length.reserve(count);
  }

  void add_row(Value key, Value value) {
    if (!key.is(Tag::kIndex) || !value.is(Tag::kStorageInfo)) unsupported("a storage entry of another type");
    const Index& index = heap_.indices[key.payload()];
    const StorageInfo& info = heap_.storage_infos[value.payload()];
    if (!index.fqn.is(Tag::kText) || !info.path.is(Tag::kText)) unsupported("a storage entry without fields");
    StorageRows& rows = columns_.rows;
    rows.fqn.push_back(columns_.fqns.add(heap_.text(index.fqn)));
    add_key_offset(index.offset);
    const int64_t hint = Heap::is_int(index.index) ? heap_.number(index.index) : StorageRows::kNoIndex;
    if (Heap::is_int(index.index) && hint == StorageRows::kNoIndex) unsupported("an index out of bounds");
    rows.index.push_back(hint);
    if (!(info.path == last_path_)) {
      last_file_ = columns_.files.add(heap_.text(info.path));
      last_path_ = info.path;
    }
    rows.file.push_back(last_file_);
    rows.offset.push_back(info.offset);
    rows.length.push_back(info.length);
    add_transforms(info.transforms);
  }

  void add_key_offset(uint32_t shape) {
    StorageRows& rows = columns_.rows;
    const size_t dims = shape == kUnset ? 0 : static_cast<size_t>(heap_.ints[shape]);
    if (dims > kMaxDims) unsupported("an offset of more than 64 dimensions");
    rows.dims.push_back(shape == kUnset ? StorageRows::kNoOffset : static_cast<uint32_t>(dims));
    rows.chunk_offset.push_back(shape == kUnset ? 0 : add_numbers(shape, dims));
  }

  void add_transforms(Value value) {
    std::vector<uint32_t>& column = columns_.rows.transforms;
    if (value.is(Tag::kNone) && column.empty()) return;
    if (columns_.transforms.empty()) columns_.transforms.emplace_back();
    column.resize(columns_.rows.size() - 1);
    column.push_back(value.is(Tag::kNone) ? 0 : transforms_code(value));
  }

  // Writers that use transforms use the same few for all entries, so a search in order will do; a file with more of
  // them is not theirs.
  uint32_t transforms_code(Value value) {
    constexpr size_t kMaxTransforms = 64;
    Transforms transforms;
    transforms.is_list = value.is(Tag::kList);
    const auto add = [&](Value name) {
      if (!name.is(Tag::kText)) unsupported("transform descriptors of another type");
      if (transforms.names.size() == kMaxTransforms) unsupported("too many transform descriptors");
      transforms.names.emplace_back(heap_.text(name));
    };
    if (transforms.is_list) {
      for_each_item(heap_, heap_.lists[value.payload()], add);
    } else if (value.is(Tag::kTuple)) {
      for (size_t i = 0; i < heap_.tuple_size(value); ++i) add(heap_.item(value, i));
    } else if (!value.is(Tag::kInts) || heap_.tuple_size(value) != 0) {
      unsupported("transform descriptors of another type");
    }
    std::vector<Transforms>& known = columns_.transforms;
    const auto found = std::find(known.begin() + 1, known.end(), transforms);
    if (found == known.end()) {
      if (known.size() == kMaxTransforms) unsupported("too many different transform descriptors");
      known.push_back(std::move(transforms));
      return static_cast<uint32_t>(known.size() - 1);
    }
    return static_cast<uint32_t>(found - known.begin());
  }

  Heap& heap_;
  Columns columns_;
  std::vector<AddedList> added_lists_;  // by list
  Value last_path_;                     // most rows are in the file of the row before
  uint32_t last_file_ = 0;
};

}  // namespace

Columns parse(checkpoint::Bytes file) {
  Heap heap;
  try {
    const Value root = unpickle(file, heap);
    return Builder(heap).build(root);
  } catch (Error& error) {
    if (error.offset < 0) {  // of the pickled object, which lies anywhere in the file
      error.offset = 0;
      error.length = static_cast<int64_t>(file.size());
    }
    throw;
  }
}

}  // namespace dcp_fast::metadata
