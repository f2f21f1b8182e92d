#include "metadata/parse.h"

#include <utility>
#include <vector>

#include "metadata/collect.h"
#include "metadata/failure.h"
#include "metadata/plain_pickle.h"
#include "metadata/unpickler.h"

namespace dcp_fast::metadata {

namespace {

class Builder {
 public:
  explicit Builder(Heap& heap) : heap_(heap), columns_(heap.columns) {}

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
    add_attributes(metadata);
    add_entries(metadata.entries);
    add_storage(metadata.storage_data);
    return std::move(columns_);
  }

 private:
  // A list of chunks that an entry had before.
  struct AddedList {
    uint64_t start = 0;  // where in `numbers` the chunks are
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

  void add_attributes(const Metadata& metadata) {
    constexpr size_t kMaxPickles = 8;
    for (size_t i = 0; i < metadata.attribute_count; ++i) {
      const HeapAttribute& known = heap_.attributes[metadata.first_attribute + i];
      Attribute attribute;
      attribute.name = heap_.texts[known.name];
      // Each pickle may be as large as the file, as attributes may share what they hold.
      if (!known.value.is(Tag::kUnset) && i < kMaxPickles) {
        try {
          attribute.pickle = plain_pickle(heap_, known.value);
          attribute.is_read = true;
        } catch (const Unsupported&) {
          attribute.is_read = false;  // it has objects
        }
      }
      columns_.attributes.push_back(std::move(attribute));
    }
  }

  // Entries

  void add_entries(Value value) {
    const Dict* dict = heap_.dict(value);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    columns_.entries.reserve(dict->sequence.items / 2);
    added_lists_.resize(heap_.lists.size());
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
    entry.kind = EntryKind::kTensor;
    place_strides(heap_.properties[tensor.properties]);
    entry.properties = heap_.properties[tensor.properties];
    entry.dims = static_cast<uint32_t>(dims);
    entry.size = numbers().size();
    if (!has_room(heap_, dims)) unsupported("shapes that are shared too often");
    for (size_t i = 0; i < dims; ++i) {
      const int64_t number = heap_.ints[tensor.size + 1 + i];
      if (number < 0) corrupt("a negative size of a tensor");
      numbers().push_back(number);
    }
    entry.chunk_count = count_chunks(tensor.chunks, dims);
    AddedList& added = added_lists_[tensor.chunks];
    // Entries that share their list share the chunks here, lest a small file grow large.
    if (!added.done) added = {place_of_chunks(tensor.chunks), true};
    entry.chunks = added.start;
  }

  // Once for each object, however many entries share it.
  void place_strides(Properties& properties) {
    if (!properties.has_strides || properties.strides_are_columns) return;
    const size_t count = properties.stride_count;
    if (count > kMaxDims || !has_room(heap_, count)) unsupported("strides of more than 64 dimensions");
    const uint64_t start = numbers().size();
    for (size_t i = 0; i < count; ++i) numbers().push_back(heap_.ints[properties.strides + i]);
    properties.strides = start;
    properties.strides_are_columns = true;
  }

  uint32_t count_chunks(uint32_t list, size_t dims) const {
    uint64_t count = 0;
    for_each_item(heap_, heap_.lists[list], [&](Value item) {
      if (!item.is(Tag::kChunks)) unsupported("a chunk of another type");
      const ChunkRun& run = heap_.chunk_runs[item.payload()];
      if (run.dims != dims) unsupported("a chunk of other dimensions than its tensor");
      if (!run.sound) corrupt("a chunk of negative offsets or sizes, or that ends beyond what 64 bits count");
      count += run.count;
    });
    if (count >= kUnset) unsupported("more chunks than 32 bits count");
    return static_cast<uint32_t>(count);
  }

  // Where in `numbers` all chunks of a list follow each other. Nearly always they do so already.
  uint64_t place_of_chunks(uint32_t list) {
    const Sequence& runs = heap_.lists[list];
    uint64_t start = 0;
    uint64_t end = 0;
    bool is_first = true;
    bool are_together = true;
    for_each_item(heap_, runs, [&](Value item) {
      const ChunkRun& run = heap_.chunk_runs[item.payload()];
      if (is_first) start = end = run.start;
      is_first = false;
      are_together = are_together && run.start == end;
      end += run.size();
    });
    if (are_together) return start;
    start = numbers().size();
    for_each_item(heap_, runs, [&](Value item) {
      const ChunkRun& run = heap_.chunk_runs[item.payload()];
      const uint64_t count = run.size();
      if (!has_room(heap_, count)) unsupported("chunks of one tensor that are far apart");
      for (uint64_t i = 0; i < count; ++i) numbers().push_back(int64_t{numbers()[run.start + i]});
    });
    return start;
  }

  std::vector<int64_t>& numbers() { return columns_.numbers; }

  // Storage data

  void add_storage(Value value) {
    columns_.has_storage = value.is(Tag::kDict);
    if (!value.is(Tag::kNone) && !value.is(Tag::kUnset)) {
      if (!columns_.has_storage) unsupported("storage data of another type");
      const Dict* dict = heap_.dict(value);
      if (dict == nullptr) unsupported("a dict of fields that is used again");
      check_rows(dict->sequence);
    } else if (columns_.rows.size() > 0) {
      unsupported("storage data in another dict");
    }
    number_anew(columns_.rows.fqn, columns_.fqns);
    number_anew(columns_.rows.file, columns_.files);
    if (!columns_.make_row_table()) unsupported("a storage entry that is there twice");
  }

  // Whether the dict has exactly the rows that there are, in their order.
  void check_rows(const Sequence& dict) const {
    uint64_t count = 0;
    bool is_key = true;
    for_each_item(heap_, dict, [&](Value item) {
      if (!is_key) {
        count += static_cast<uint64_t>(item.number());
      } else if (!item.is(Tag::kRows)) {
        unsupported("a storage entry of another type");
      } else if (item.payload() != count) {
        unsupported("storage data in several dicts");
      }
      is_key = !is_key;
    });
    if (count != columns_.rows.size()) unsupported("storage data in several dicts");
  }

  // From the numbers that texts have in the heap to those that they have in a table of their own.
  void number_anew(std::vector<uint32_t>& column, TextTable& table) {
    std::vector<uint32_t> numbers(heap_.texts.size(), TextTable::kNone);
    for (uint32_t& text : column) {
      uint32_t& number = numbers[text];
      if (number == TextTable::kNone) number = table.add(heap_.texts[text]);
      text = number;
    }
  }

  Heap& heap_;
  Columns& columns_;
  std::vector<AddedList> added_lists_;  // by list
};

}  // namespace

Columns parse(Source& source, Batches batches) {
  Heap heap(source.size());
  try {
    const Value root = unpickle(source, batches, heap);
    return Builder(heap).build(root);
  } catch (Error& error) {
    if (error.kind == ErrorKind::kCorruptMetadata && error.offset < 0) {  // of the object, which lies anywhere in it
      error.offset = 0;
      error.length = static_cast<int64_t>(source.size());
    }
    throw;
  }
}

}  // namespace dcp_fast::metadata
