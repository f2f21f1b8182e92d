#include "metadata/safetensors_columns.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>

#include "error.h"
#include "metadata/failure.h"
#include "metadata/json.h"

namespace dcp_fast::metadata {

namespace {

constexpr int64_t kMostIndexBytes = 100'000'000;

class Collector {
 public:
  Collector(const std::vector<Header>& headers, const std::vector<std::string>& paths)
      : headers_(headers), paths_(paths) {}

  Columns collect() {
    name_entries();
    place_entries();
    columns_.has_storage = true;
    columns_.row_table.reserve(fqns_.size());
    size_t next = 0;
    for (size_t file = 0; file < headers_.size(); ++file) {
      for (const HeaderTensor& tensor : headers_[file].tensors) add_row(fqns_[next++], tensor, file);
    }
    return std::move(columns_);
  }

 private:
  // Numbers the FQNs, and counts the chunks of each.
  void name_entries() {
    for (size_t file = 0; file < headers_.size(); ++file) {
      for (const HeaderTensor& tensor : headers_[file].tensors) {
        const uint32_t fqn = columns_.fqns.add(tensor.name);
        fqns_.push_back(fqn);
        if (fqn == columns_.entries.size()) {
          Entry entry;
          entry.kind = EntryKind::kTensor;
          entry.properties.dtype = tensor.dtype;
          entry.properties.complete = true;
          entry.dims = tensor.dims;
          columns_.entries.push_back(entry);
          first_file_.push_back(static_cast<uint32_t>(file));
        }
        Entry& entry = columns_.entries[fqn];
        ++entry.chunk_count;
        if (entry.dims != tensor.dims) contradict("dimensions", tensor, file, paths_[first_file_[fqn]]);
      }
    }
  }

  // Finds room in the columns for the size of each entry, and for its chunks.
  void place_entries() {
    size_t numbers = 0;
    for (Entry& entry : columns_.entries) {
      entry.size = numbers;
      entry.chunks = numbers + entry.dims;
      numbers += size_t{entry.dims} * (1 + 2 * size_t{entry.chunk_count});
      entry.chunk_count = 0;  // again when they come
    }
    columns_.numbers.resize(numbers);
  }

  void add_row(uint32_t fqn, const HeaderTensor& tensor, size_t file) {
    Entry& entry = columns_.entries[fqn];
    const int64_t* chunk = headers_[file].numbers.data() + tensor.numbers;
    const size_t dims = entry.dims;
    const uint64_t place = entry.chunks + 2 * dims * entry.chunk_count++;
    std::copy(chunk, chunk + 2 * dims, columns_.numbers.data() + place);
    int64_t* size = columns_.numbers.data() + entry.size;
    for (size_t i = 0; i < dims; ++i) size[i] = std::max(size[i], chunk[i] + chunk[dims + i]);

    StorageRows& rows = columns_.rows;
    auto row = static_cast<uint32_t>(rows.size());
    const auto put = [&](auto& column, auto value) {
      if (row == column.size()) {
        column.push_back(value);
      } else {
        column[row] = value;
      }
    };
    put(rows.fqn, fqn);
    put(rows.dims, entry.dims);
    put(rows.chunk_offset, place);
    const uint32_t known = columns_.index_row(row);
    if (known != HashTable::kNone) {
      // A dict keeps the place of a key, and takes the new value.
      rows.truncate(row);
      row = known;
      const int64_t* before = columns_.numbers.data() + rows.chunk_offset[row];
      if (!std::equal(before + dims, before + 2 * dims, chunk + dims)) {
        contradict("sizes", tensor, file, std::string(columns_.files[rows.file[row]]));
      }
      rows.chunk_offset[row] = place;
    }
    put(rows.index, StorageRows::kNoIndex);
    put(rows.file, columns_.files.add(paths_[file]));
    put(rows.offset, tensor.begin);
    put(rows.length, tensor.end - tensor.begin);
    put(rows.dtypes, tensor.dtype);
  }

  [[noreturn]] void contradict(const std::string& what, const HeaderTensor& tensor, size_t file,
                               const std::string& other) const {
    Error error(ErrorKind::kCorruptHeader, "the tensor has other " + what + " than in the file " + other, paths_[file],
                tensor.begin, tensor.end - tensor.begin);
    error.fqn = tensor.name;
    throw Error(error);
  }

  const std::vector<Header>& headers_;
  const std::vector<std::string>& paths_;
  Columns columns_;
  std::vector<uint32_t> fqns_;        // of all tensors, file by file
  std::vector<uint32_t> first_file_;  // of each entry
};

std::string_view name_of_file(std::string_view path) { return path.substr(path.rfind('/') + 1); }

[[noreturn]] void fail(const ErrorKind kind, const std::string& reason, const std::string& path,
                       const std::string& fqn) {
  Error error(kind, reason, path);
  error.fqn = fqn;
  if (kind == ErrorKind::kIo) error.error_number = ENOENT;
  throw Error(error);
}

}  // namespace

Columns collect_headers(const std::vector<Header>& headers, const std::vector<std::string>& paths) {
  return Collector(headers, paths).collect();
}

void check_index(const io::ByteSource& index, const std::vector<Header>& headers, const std::vector<std::string>& paths,
                 io::IoCounters& counters) {
  if (index.size() > kMostIndexBytes) {
    throw Error(ErrorKind::kCorruptHeader, "the index is larger than an index may be", index.path(), 0, index.size());
  }
  std::unordered_map<std::string_view, size_t> files;
  for (size_t i = 0; i < paths.size(); ++i) files.emplace(name_of_file(paths[i]), i);
  const std::string text = read_json(index, 0, index.size(), counters);
  const std::string name(name_of_file(index.path()));
  const std::string folder = index.path().substr(0, index.path().size() - name.size());
  bool has_map = false;
  Json json(text, 0);
  json.object([&](const std::string& key) {
    if (key != "weight_map") return json.skip();
    has_map = true;
    json.object([&](const std::string& fqn) {
      const std::string file = json.string();
      const auto found = files.find(file);
      if (found == files.end()) {
        fail(ErrorKind::kIo, name + " says that a file holds the tensor, but there is no such file", folder + file,
             fqn);
      }
      if (headers[found->second].find(fqn) == nullptr) {
        fail(ErrorKind::kCorruptHeader, name + " says that the file holds the tensor, but it does not",
             paths[found->second], fqn);
      }
    });
  });
  json.finish();
  if (!has_map) json.fail("the index has no weight_map");
}

}  // namespace dcp_fast::metadata
