// Metadata of a checkpoint as columns of integers: what torch keeps as some eight objects for each chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "metadata/hash_table.h"
#include "metadata/names.h"
#include "metadata/text_table.h"

namespace dcp_fast::metadata {

struct Properties {
  uint8_t dtype = 0;
  uint8_t layout = 0;
  MemoryFormat memory_format = MemoryFormat::kContiguous;
  bool requires_grad = false;
  bool pin_memory = false;
  bool of_shard = false;  // of the class Global::kShardTensorProperties
  bool complete = false;
  // Of torch 2.15 on: the strides of the tensor, where there were any. In the columns, `strides` says where in
  // `numbers` they are; until then, where in Heap::ints.
  bool has_strides = false;
  uint32_t stride_count = 0;
  uint64_t strides = 0;
  bool strides_are_columns = false;
};

enum class EntryKind : uint8_t { kBytes, kTensor };

// One key of state_dict_metadata.
struct Entry {
  EntryKind kind = EntryKind::kBytes;
  // Only of tensors:
  Properties properties;
  uint64_t size = 0;  // where in `numbers` the size of the whole tensor is
  uint32_t dims = 0;
  uint32_t chunk_count = 0;
  uint64_t chunks = 0;  // where in `numbers` they are: the offsets and then the sizes of each
};

// The keys and values of storage_data, in its order, one item a row in each column.
struct StorageRows {
  static constexpr int64_t kNoIndex = INT64_MIN;
  static constexpr uint32_t kNoOffset = UINT32_MAX;

  std::vector<uint32_t> fqn;
  std::vector<uint32_t> dims;          // kNoOffset: the key has no offset
  std::vector<uint64_t> chunk_offset;  // where in `numbers` the key's offset is
  std::vector<int64_t> index;          // the key's hint, kNoIndex if it has none
  std::vector<uint32_t> file;
  std::vector<int64_t> offset;
  std::vector<int64_t> length;
  std::vector<uint32_t> transforms;  // empty if no row has any; index into Columns::transforms, where 0 is none
  // Not empty if records are mere payloads: what they hold, in codes of kDTypeNames. The sizes of a payload are then in
  // `numbers` behind the key's offset.
  std::vector<uint8_t> dtypes;

  size_t size() const { return fqn.size(); }
  // All that have an item for each row.
  template <typename Visit>
  void for_each_column(const Visit& visit) {
    visit(fqn);
    visit(dims);
    visit(chunk_offset);
    visit(index);
    visit(file);
    visit(offset);
    visit(length);
  }
  void truncate(size_t rows) {
    for_each_column([rows](auto& column) { column.resize(rows); });
    if (!transforms.empty()) transforms.resize(rows);
    if (dtypes.size() > rows) dtypes.resize(rows);
  }
};

// As torch keeps them, in a list or tuple.
struct Transforms {
  bool is_list = false;
  std::vector<std::string> names;
  bool operator==(const Transforms& other) const { return is_list == other.is_list && names == other.names; }
};

// An attribute of the metadata that torch's class does not have, such as Megatron-Core adds.
struct Attribute {
  std::string name;
  bool is_read = false;  // whether `pickle` holds it; if not, only the file does
  std::string pickle;    // see plain_pickle.h
};

// A field that a class of this file has and the columns have no place for.
struct LeftOut {
  Global type = Global::kMetadata;
  std::string name;
  bool operator==(const LeftOut& other) const { return type == other.type && name == other.name; }
};

struct Columns {
  TextTable fqns;              // the first are those of the entries, in their order; others only have storage rows
  std::vector<Entry> entries;  // by FQN
  std::vector<int64_t> numbers;

  TextTable files;
  bool has_storage = false;  // whether storage_data is a dict; it may be None
  StorageRows rows;
  std::vector<Transforms> transforms;
  HashTable row_table;

  // Pickles of nothing but plain values; see plain_pickle.h.
  std::string planner_data;
  std::string storage_meta;  // (checkpoint_id, save_id, load_id, modules), or empty for none
  std::vector<Attribute> attributes;
  std::vector<LeftOut> left_out;  // each once
  bool has_version = false;
  std::string version;

  // The row whose key is equal, as MetadataIndex has it: its index plays no part. kNone if there is none. `dims` may be
  // kNoOffset.
  uint32_t find_row(uint32_t fqn, const int64_t* offset, uint32_t dims) const;
  // Whether a transform was applied to the record of a storage row.
  bool is_transformed(uint32_t row) const {
    return !rows.transforms.empty() && !transforms[rows.transforms[row]].names.empty();
  }

  // Makes the table. False if two keys are equal.
  bool make_row_table();
  // Adds one row to the table, which has room, unless there is an equal key: then returns its row, else kNone.
  uint32_t index_row(uint32_t row);

 private:
  bool row_equals(uint32_t row, uint32_t fqn, const int64_t* offset, uint32_t dims) const;
};

}  // namespace dcp_fast::metadata
