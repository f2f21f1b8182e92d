#include "metadata/columns_section.h"

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "metadata/failure.h"
#include "metadata/heap.h"
#include "metadata/names.h"
#include "metadata/plain_pickle.h"
#include "metadata/source.h"
#include "metadata/text.h"
#include "metadata/unpickler.h"

namespace dcp_fast::metadata {

namespace {

// First in the stream: builds that write something else have another one.
constexpr uint64_t kMagic = 0x31736e6d756c6f43;  // "Columns1"
constexpr uint64_t kMaxDims = 64;
constexpr uint64_t kMaxNumber = (uint64_t{1} << 62) - 1;

class Writer {
 public:
  void number(uint64_t value) {
    for (size_t i = 0; i < sizeof value; ++i) bytes_.push_back(static_cast<uint8_t>(value >> (8 * i)));
  }
  void text(std::string_view value) {
    number(value.size());
    bytes_.insert(bytes_.end(), value.begin(), value.end());
  }
  void texts(const TextTable& table) {
    number(table.size());
    for (size_t i = 0; i < table.size(); ++i) text(table[i]);
  }
  std::vector<uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

class Reader {
 public:
  explicit Reader(checkpoint::Bytes bytes) : bytes_(bytes) {}

  uint64_t number() {
    const uint64_t value = bytes_.u64();
    check();
    return value;
  }
  // A number of at most `most`.
  uint64_t number(uint64_t most) {
    const uint64_t value = number();
    if (value > most) corrupt("a number of the columns that is out of bounds");
    return value;
  }
  bool flag() { return number(1) != 0; }
  std::string_view raw() {
    const std::string_view value = bytes_.text(static_cast<size_t>(number(bytes_.size())));
    check();
    return value;
  }
  std::string_view text() {
    const std::string_view value = raw();
    if (!is_utf8(value)) corrupt("a text of the columns that is none");
    return value;
  }
  void texts(TextTable& table) {
    const uint64_t count = number();
    for (uint64_t i = 0; i < count; ++i) {
      if (table.add(text()) != i) corrupt("a text of the columns that is there twice");
    }
  }
  void end() const {
    if (bytes_.position() != bytes_.size()) corrupt("bytes after the end of the columns");
  }

 private:
  void check() const {
    if (!bytes_.ok()) corrupt("columns that are cut");
  }
  checkpoint::Bytes bytes_;
};

// Whether plain_pickle() wrote it, and for storage_meta whether it is a tuple of four. Python unpickles it without
// further checks. What plain_pickle() writes names nothing that could do harm, and nothing else comes out of it as it
// went in.
bool is_plain(const std::string& pickle, bool is_storage_meta) {
  MemorySource source(checkpoint::Bytes(reinterpret_cast<const std::byte*>(pickle.data()), pickle.size()));
  Heap heap(source.size());
  try {
    const Value root = unpickle(source, FastLane::kNo, heap);
    const bool is_tuple = root.is(Tag::kTuple) || root.is(Tag::kInts);
    return (!is_storage_meta || (is_tuple && heap.tuple_size(root) == 4)) && plain_pickle(heap, root) == pickle;
  } catch (const Unsupported&) {
    return false;
  } catch (const Error&) {
    return false;
  }
}

bool has_plain_pickles(const Columns& columns) {
  return is_plain(columns.planner_data, false) &&
         (columns.storage_meta.empty() || is_plain(columns.storage_meta, true));
}

void write_entry(const Entry& entry, Writer& out) {
  out.number(entry.kind == EntryKind::kTensor ? 1 : 0);
  if (entry.kind == EntryKind::kBytes) return;
  const Properties& properties = entry.properties;
  out.number(uint64_t{properties.dtype} | uint64_t{properties.layout} << 8 |
             static_cast<uint64_t>(properties.memory_format) << 16 | uint64_t{properties.requires_grad} << 24 |
             uint64_t{properties.pin_memory} << 25 | uint64_t{properties.of_shard} << 26);
  out.number(entry.dims);
  out.number(entry.chunk_count);
  out.number(entry.size);
  out.number(entry.chunks);
}

Entry read_entry(Reader& in) {
  Entry entry;
  if (!in.flag()) return entry;
  entry.kind = EntryKind::kTensor;
  const uint64_t packed = in.number((uint64_t{1} << 27) - 1);
  const uint64_t memory_format = packed >> 16 & 0xff;
  Properties& properties = entry.properties;
  properties.dtype = static_cast<uint8_t>(packed & 0xff);
  properties.layout = static_cast<uint8_t>(packed >> 8 & 0xff);
  if (properties.dtype >= kDTypeNames.size() || properties.layout >= kLayoutNames.size() ||
      memory_format >= kMemoryFormatNames.size()) {
    corrupt("an entry of the columns with unknown properties");
  }
  properties.memory_format = static_cast<MemoryFormat>(memory_format);
  properties.requires_grad = (packed >> 24 & 1) != 0;
  properties.pin_memory = (packed >> 25 & 1) != 0;
  properties.of_shard = (packed >> 26 & 1) != 0;
  properties.complete = true;
  entry.dims = static_cast<uint32_t>(in.number(kMaxDims));
  entry.chunk_count = static_cast<uint32_t>(in.number(kUnset - 1));
  entry.size = in.number();
  entry.chunks = in.number();
  return entry;
}

bool within(uint64_t start, uint64_t count, size_t size) { return start <= size && count <= size - start; }

}  // namespace

std::vector<uint8_t> encode_first_section(const Columns& columns) {
  if (!has_plain_pickles(columns)) unsupported("a pickle that the decoder would not take");
  Writer out;
  out.number(kMagic);
  out.number(columns.has_storage ? 1 : 0);
  out.number(columns.has_version ? 1 : 0);
  out.text(columns.version);
  out.text(columns.planner_data);
  out.text(columns.storage_meta);
  out.texts(columns.fqns);
  out.texts(columns.files);
  out.number(columns.transforms.size());
  for (const Transforms& transforms : columns.transforms) {
    out.number(transforms.is_list ? 1 : 0);
    out.number(transforms.names.size());
    for (const std::string& name : transforms.names) out.text(name);
  }
  out.number(columns.entries.size());
  for (const Entry& entry : columns.entries) write_entry(entry, out);
  return out.take();
}

void decode_first_section(checkpoint::Bytes bytes, Columns& columns) {
  Reader in(bytes);
  if (in.number() != kMagic) corrupt("columns of another build");
  columns.has_storage = in.flag();
  columns.has_version = in.flag();
  columns.version = in.text();
  columns.planner_data = in.raw();
  columns.storage_meta = in.raw();
  if (!has_plain_pickles(columns)) corrupt("a pickle that the parser did not write");
  in.texts(columns.fqns);
  in.texts(columns.files);
  // What a count promises is cut before it fills the memory: each item takes bytes.
  for (uint64_t left = in.number(); left > 0; --left) {
    Transforms transforms;
    transforms.is_list = in.flag();
    for (uint64_t names = in.number(); names > 0; --names) transforms.names.emplace_back(in.text());
    columns.transforms.push_back(std::move(transforms));
  }
  const uint64_t entries = in.number(columns.fqns.size());
  columns.entries.reserve(static_cast<size_t>(entries));
  for (uint64_t i = 0; i < entries; ++i) columns.entries.push_back(read_entry(in));
  in.end();
}

bool numbers_are_small(const std::vector<int64_t>& numbers) {
  uint64_t bits = 0;
  for (const int64_t number : numbers) bits |= static_cast<uint64_t>(number);
  return bits <= kMaxNumber;
}

void check_numbers(Columns& columns, uint64_t file_bytes) {
  const size_t numbers = columns.numbers.size();
  if (!numbers_are_small(columns.numbers)) corrupt("an offset or size of the columns that is out of bounds");
  for (const Entry& entry : columns.entries) {
    if (!within(entry.size, entry.dims, numbers) ||
        !within(entry.chunks, uint64_t{2} * entry.dims * entry.chunk_count, numbers) ||
        entry.chunk_count > file_bytes) {
      corrupt("an entry of the columns with chunks that are not there");
    }
  }
  const StorageRows& rows = columns.rows;
  const size_t count = rows.size();
  for (const size_t size : {rows.dims.size(), rows.chunk_offset.size(), rows.index.size(), rows.file.size(),
                            rows.offset.size(), rows.length.size()}) {
    if (size != count) corrupt("columns of different lengths");
  }
  if (!rows.transforms.empty() && rows.transforms.size() != count) corrupt("columns of different lengths");
  if (count >= HashTable::kNone) corrupt("more rows than 32 bits count");
  for (size_t row = 0; row < count; ++row) {
    const uint32_t dims = rows.dims[row] == StorageRows::kNoOffset ? 0 : rows.dims[row];
    if (rows.fqn[row] >= columns.fqns.size() || rows.file[row] >= columns.files.size() || dims > kMaxDims ||
        !within(rows.chunk_offset[row], dims, numbers) ||
        (!rows.transforms.empty() && rows.transforms[row] >= columns.transforms.size())) {
      corrupt("a row of the columns that refers to what is not there");
    }
  }
  if (!columns.make_row_table()) corrupt("a row of the columns that is there twice");
}

}  // namespace dcp_fast::metadata
