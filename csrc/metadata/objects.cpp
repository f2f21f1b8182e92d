#include "metadata/objects.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "metadata/failure.h"
#include "metadata/sequences.h"

namespace dcp_fast::metadata {

namespace {

template <typename T>
uint64_t append(BlockList<T>& list) {
  if (list.size() >= kUnset) unsupported("more objects than 32 bits count");
  list.push_back(T{});
  return list.size() - 1;
}

bool is_global(Value value, Global global) {
  return value.is(Tag::kGlobal) && value.payload() == static_cast<uint64_t>(global);
}

bool is_empty_tuple(const Heap& heap, Value value) { return value.is(Tag::kInts) && heap.tuple_size(value) == 0; }

bool is_text_or_none(Value value) { return value.is(Tag::kText) || value.is(Tag::kNone); }

Value memory_format(uint64_t type, size_t format) { return Value(Tag::kMemoryFormat, type << 8 | format); }

// The same object as from the class: see the pickles of Python 3.11, whose enums name their members.
Value get_attribute(const Heap& heap, Value arguments) {
  if (!arguments.is(Tag::kTuple) || heap.tuple_size(arguments) != 2) unsupported("getattr");
  const Value type = heap.item(arguments, 0);
  const Value name = heap.item(arguments, 1);
  if (is_global(type, Global::kInert) && name.is(Tag::kText)) return Value(Tag::kInert);
  if ((!is_global(type, Global::kMemoryFormat) && !is_global(type, Global::kShardMemoryFormat)) ||
      !name.is(Tag::kText)) {
    unsupported("getattr");
  }
  const auto format = code_of(kMemoryFormatNames, heap.text(name));
  if (!format) unsupported("getattr");
  return memory_format(type.payload(), *format);
}

Value make_memory_format(const Heap& heap, Value type, Value arguments) {
  if (!arguments.is(Tag::kInts) || heap.tuple_size(arguments) != 1) unsupported("memory format");
  const int64_t format = heap.ints[arguments.payload() + 1];
  if (format < 0 || format >= static_cast<int64_t>(kMemoryFormatNames.size())) unsupported("memory format");
  return memory_format(type.payload(), static_cast<size_t>(format));
}

Value make_layout(const Heap& heap, Value arguments) {
  if (!arguments.is(Tag::kTuple) || heap.tuple_size(arguments) != 1 || !heap.item(arguments, 0).is(Tag::kText)) {
    unsupported("layout");
  }
  const auto code = code_of(kLayoutNames, heap.text(heap.item(arguments, 0)));
  if (!code) unsupported("layout");
  return Value(Tag::kLayout, *code);
}

Value make_path(Heap& heap, Value type, Value parts) {
  if (!parts.is(Tag::kTuple) && !is_empty_tuple(heap, parts)) unsupported("path");
  for (size_t i = 0; i < heap.tuple_size(parts); ++i) {
    if (!heap.item(parts, i).is(Tag::kText)) unsupported("path");
  }
  const uint64_t index = append(heap.paths);
  heap.paths[index] = {static_cast<Global>(type.payload()), parts};
  return Value(Tag::kPath, index);
}

Value make_dict(Heap& heap, Value arguments) {
  if (!is_empty_tuple(heap, arguments)) unsupported("dict with arguments");
  return new_dict(heap);
}

// Finds fields by name in what BUILD brought.
class Fields {
 public:
  Fields(const Heap& heap, const Value* items, size_t count) : heap_(heap), items_(items), count_(count) {}

  Value take(std::string_view name) {
    for (size_t i = 0; i < count_; i += 2) {
      if (items_[i].is(Tag::kText) && heap_.text(items_[i]) == name) return note(name, items_[i + 1]);
    }
    return {};
  }
  // For fields that nearly always come in this place.
  Value take_at(size_t place, std::string_view name) {
    if (2 * place < count_ && items_[2 * place].is(Tag::kText) && heap_.text(items_[2 * place]) == name) {
      return note(name, items_[2 * place + 1]);
    }
    return take(name);
  }
  // Calls visit(name, value) for the fields that nobody took.
  template <typename Visit>
  void for_each_other(const Visit& visit) const {
    if (2 * taken_ == count_) return;
    size_t others = 0;
    for (size_t i = 0; i < count_; i += 2) {
      if (!items_[i].is(Tag::kText)) unsupported("a field whose name is no text");
      const std::string_view name = heap_.text(items_[i]);
      if (std::find(names_.begin(), names_.begin() + taken_, name) != names_.begin() + taken_) continue;
      // Special methods would be as good as code.
      if (name.substr(0, 2) == "__") unsupported("the field " + std::string(name));
      ++others;
      visit(items_[i], items_[i + 1]);
    }
    if (2 * (taken_ + others) != count_) unsupported("a field that is there twice");
  }

 private:
  Value note(std::string_view name, Value value) {
    names_.at(taken_++) = name;
    return value;
  }

  const Heap& heap_;
  const Value* items_;
  size_t count_;
  std::array<std::string_view, 5> names_;  // of those that were taken
  size_t taken_ = 0;
};

uint32_t size_of(Value value) {
  if (!value.is(Tag::kSize)) unsupported("a shape that is no torch.Size");
  return static_cast<uint32_t>(value.payload());
}

void set(Chunk& chunk, Fields& fields) {
  if (chunk.offsets != kUnset) unsupported("a chunk that is built twice");
  chunk.offsets = size_of(fields.take_at(0, "offsets"));
  chunk.sizes = size_of(fields.take_at(1, "sizes"));
}

void set(const Heap& heap, Tensor& tensor, Fields& fields) {
  if (tensor.properties != kUnset) unsupported("an entry that is built twice");
  const Value properties = fields.take("properties");
  const Value chunks = fields.take("chunks");
  if (!properties.is(Tag::kProperties) || !heap.properties[properties.payload()].complete || !chunks.is(Tag::kList)) {
    unsupported("an entry without properties or chunks");
  }
  tensor.size = size_of(fields.take("size"));
  tensor.properties = static_cast<uint32_t>(properties.payload());
  tensor.chunks = static_cast<uint32_t>(chunks.payload());
}

void set(Index& index, Fields& fields) {
  if (index.fqn.is(Tag::kText)) unsupported("an index that is built twice");
  const Value fqn = fields.take_at(0, "fqn");
  const Value number = fields.take_at(1, "index");
  const Value offset = fields.take_at(2, "offset");
  if (!fqn.is(Tag::kText)) unsupported("an index without an FQN");
  if (!number.is(Tag::kUnset) && !number.is(Tag::kNone) && !Heap::is_int(number)) unsupported("an index by no number");
  index.offset = offset.is(Tag::kUnset) || offset.is(Tag::kNone) ? kUnset : size_of(offset);
  index.index = Heap::is_int(number) ? number : Value(Tag::kNone);
  index.fqn = fqn;
}

void set(const Heap& heap, StorageInfo& info, Fields& fields) {
  if (info.path.is(Tag::kText)) unsupported("a storage info that is built twice");
  const Value path = fields.take_at(0, "relative_path");
  const Value offset = fields.take_at(1, "offset");
  const Value length = fields.take_at(2, "length");
  const Value transforms = fields.take_at(3, "transform_descriptors");
  if (!path.is(Tag::kText) || !Heap::is_int(offset) || !Heap::is_int(length)) {
    unsupported("a storage info of other types");
  }
  info.transforms = transforms.is(Tag::kUnset) ? Value(Tag::kNone) : transforms;
  info.offset = heap.number(offset);
  info.length = heap.number(length);
  info.path = path;
}

void set(StorageMeta& meta, Fields& fields) {
  meta = {fields.take("checkpoint_id"), fields.take("save_id"), fields.take("load_id"), fields.take("modules")};
}

void set(Heap& heap, Metadata& metadata, Fields& fields) {
  if (!metadata.entries.is(Tag::kUnset)) unsupported("metadata that is built twice");
  metadata.entries = fields.take("state_dict_metadata");
  metadata.planner_data = fields.take("planner_data");
  metadata.storage_data = fields.take("storage_data");
  metadata.storage_meta = fields.take("storage_meta");
  metadata.version = fields.take("version");
  metadata.first_attribute = heap.attributes.size();
  fields.for_each_other([&](Value name, Value value) {
    heap.attributes.push_back({static_cast<uint32_t>(name.payload()), value});
    ++metadata.attribute_count;
  });
  if (!metadata.entries.is(Tag::kDict)) unsupported("metadata without entries");
  if (!metadata.version.is(Tag::kUnset) && !is_text_or_none(metadata.version)) unsupported("a version of another type");
}

}  // namespace

bool is_metadata_field(std::string_view name) {
  constexpr std::array<std::string_view, 5> kFields = {"state_dict_metadata", "planner_data", "storage_data",
                                                       "storage_meta", "version"};
  return std::find(kFields.begin(), kFields.end(), name) != kFields.end();
}

void leave_out(Heap& heap, Global type, std::string_view name) {
  constexpr size_t kMaxLeftOut = 64;
  constexpr size_t kMaxName = 128;
  LeftOut field{type, std::string(name)};
  std::vector<LeftOut>& known = heap.columns.left_out;
  if (std::find(known.begin(), known.end(), field) != known.end()) return;
  if (known.size() == kMaxLeftOut || name.size() > kMaxName) unsupported("more fields than any torch writes");
  known.push_back(std::move(field));
}

Value call(Heap& heap, Value callable, Value arguments) {
  if (!callable.is(Tag::kGlobal)) unsupported("a call of what is no global");
  switch (static_cast<Global>(callable.payload())) {
    case Global::kSize:
      if (arguments.is(Tag::kIntsInTuple)) return Value(Tag::kSize, arguments.payload());
      unsupported("torch.Size");
    case Global::kMemoryFormat:
    case Global::kShardMemoryFormat:
      return make_memory_format(heap, callable, arguments);
    case Global::kGetattr:
      return get_attribute(heap, arguments);
    case Global::kGetLayout:
      return make_layout(heap, arguments);
    case Global::kPosixPath:
    case Global::kPurePosixPath:
    case Global::kPureWindowsPath:
      return make_path(heap, callable, arguments);
    case Global::kDict:
      return make_dict(heap, arguments);
    case Global::kInert:
      return Value(Tag::kInert);
    default:
      unsupported("a call of a class");
  }
}

Value new_object(Heap& heap, Value type) {
  if (!type.is(Tag::kGlobal)) unsupported("an object of what is no class");
  switch (static_cast<Global>(type.payload())) {
    case Global::kChunkStorageMetadata:
      return Value(Tag::kChunk, append(heap.chunks));
    case Global::kTensorStorageMetadata:
      return Value(Tag::kTensor, append(heap.tensors));
    case Global::kBytesStorageMetadata:
      return Value(Tag::kBytesEntry);
    case Global::kTensorProperties:
    case Global::kShardTensorProperties: {
      const uint64_t index = append(heap.properties);
      heap.properties[index].of_shard = is_global(type, Global::kShardTensorProperties);
      return Value(Tag::kProperties, index);
    }
    case Global::kMetadataIndex:
      return Value(Tag::kIndex, append(heap.indices));
    case Global::kStorageInfo:
      return Value(Tag::kStorageInfo, append(heap.storage_infos));
    case Global::kStorageMeta:
      return Value(Tag::kStorageMeta, append(heap.storage_metas));
    case Global::kMetadata:
      return Value(Tag::kMetadata, append(heap.metadatas));
    case Global::kInert:
      return Value(Tag::kInert);
    default:
      unsupported("an object of another class");
  }
}

void set_fields(Heap& heap, Value object, const Value* items, size_t count) {
  Fields fields(heap, items, count);
  const uint64_t index = object.payload();
  Global type = Global::kMetadata;
  switch (object.tag()) {
    case Tag::kChunk:
      type = Global::kChunkStorageMetadata;
      set(heap.chunks[index], fields);
      break;
    case Tag::kTensor:
      type = Global::kTensorStorageMetadata;
      set(heap, heap.tensors[index], fields);
      break;
    case Tag::kBytesEntry:
      type = Global::kBytesStorageMetadata;
      break;
    case Tag::kIndex:
      type = Global::kMetadataIndex;
      set(heap.indices[index], fields);
      break;
    case Tag::kStorageInfo:
      type = Global::kStorageInfo;
      set(heap, heap.storage_infos[index], fields);
      break;
    case Tag::kStorageMeta:
      type = Global::kStorageMeta;
      set(heap.storage_metas[index], fields);
      break;
    case Tag::kMetadata:
      set(heap, heap.metadatas[index], fields);
      return;
    case Tag::kInert:
      return;
    default:
      unsupported("fields of another object");
  }
  fields.for_each_other([&](Value name, Value) { leave_out(heap, type, heap.text(name)); });
}

void set_state(Heap& heap, Value object, Value state) {
  if (object.is(Tag::kInert)) return;
  if (!object.is(Tag::kProperties) || !state.is(Tag::kTuple) || heap.tuple_size(state) < 5) {
    unsupported("state of another object");
  }
  Properties& properties = heap.properties[object.payload()];
  const Value dtype = heap.item(state, 0);
  const Value layout = heap.item(state, 1);
  const Value requires_grad = heap.item(state, 2);
  const Value format = heap.item(state, 3);
  const Value pin_memory = heap.item(state, 4);
  const Value strides = heap.tuple_size(state) > 5 ? heap.item(state, 5) : Value(Tag::kNone);
  const auto is_bool = [](Value value) { return value.is(Tag::kTrue) || value.is(Tag::kFalse); };
  const auto format_type = properties.of_shard ? Global::kShardMemoryFormat : Global::kMemoryFormat;
  if (properties.complete || !dtype.is(Tag::kDType) || !layout.is(Tag::kLayout) || !is_bool(requires_grad) ||
      !format.is(Tag::kMemoryFormat) || format.payload() >> 8 != static_cast<uint64_t>(format_type) ||
      !is_bool(pin_memory) || (!strides.is(Tag::kInts) && !strides.is(Tag::kNone))) {
    unsupported("properties that DCP does not write");
  }
  const Global type = properties.of_shard ? Global::kShardTensorProperties : Global::kTensorProperties;
  for (size_t i = 6; i < heap.tuple_size(state); ++i) leave_out(heap, type, std::to_string(i));
  properties.has_strides = strides.is(Tag::kInts);
  if (properties.has_strides) {
    properties.strides = strides.payload() + 1;
    properties.stride_count = static_cast<uint32_t>(heap.tuple_size(strides));
  }
  properties.dtype = static_cast<uint8_t>(dtype.payload());
  properties.layout = static_cast<uint8_t>(layout.payload());
  properties.requires_grad = requires_grad.is(Tag::kTrue);
  properties.memory_format = static_cast<MemoryFormat>(format.payload() & 0xff);
  properties.pin_memory = pin_memory.is(Tag::kTrue);
  properties.complete = true;
}

}  // namespace dcp_fast::metadata
