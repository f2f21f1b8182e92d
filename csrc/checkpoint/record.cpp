#include "checkpoint/record.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "checkpoint/tensor_pickle.h"
#include "checkpoint/zip.h"

namespace dcp_fast::checkpoint {

namespace {

using Status = ParsedRecord::Status;

ParsedRecord unknown(std::string reason) {
  ParsedRecord parsed;
  parsed.reason = std::move(reason);
  return parsed;
}

ParsedRecord corrupt(std::string reason) {
  ParsedRecord parsed = unknown(std::move(reason));
  parsed.status = Status::kCorrupt;
  return parsed;
}

ParsedRecord needs_more(const Bytes& head, const Bytes& tail, uint64_t head_bytes, uint64_t tail_bytes,
                        int64_t length) {
  if (std::max(head_bytes, tail_bytes) > static_cast<uint64_t>(kMaxWindowBytes)) return unknown("header too large");
  ParsedRecord parsed;
  parsed.status = Status::kNeedsMore;
  parsed.head = std::min<int64_t>(length, static_cast<int64_t>(std::max<uint64_t>(head_bytes, head.size())));
  parsed.tail = std::min<int64_t>(length, static_cast<int64_t>(std::max<uint64_t>(tail_bytes, tail.size())));
  return parsed;
}

// The entries of a tensor's archive, found by name below the archive's own folder.
struct Entries {
  const ZipEntry* pickle = nullptr;
  const ZipEntry* byteorder = nullptr;
  std::vector<const ZipEntry*> storages;
};

std::optional<Entries> sort_entries(const ZipDirectory& directory) {
  Entries entries;
  if (directory.entries.empty()) return std::nullopt;
  const std::string_view first = directory.entries[0].name;
  const std::string_view folder = first.substr(0, first.find('/') + 1);
  for (const ZipEntry& entry : directory.entries) {
    const size_t slash = entry.name.find('/');
    if (slash == std::string_view::npos || entry.name.substr(0, slash + 1) != folder) return std::nullopt;
    const std::string_view name = entry.name.substr(slash + 1);
    if (name == "data.pkl") {
      if (entries.pickle != nullptr) return std::nullopt;
      entries.pickle = &entry;
    } else if (name == "byteorder") {
      entries.byteorder = &entry;
    } else if (name.substr(0, 5) == "data/") {
      entries.storages.push_back(&entry);
    } else if (name != "version" && name != ".format_version" && name != ".storage_alignment" &&
               name != ".data/serialization_id") {
      return std::nullopt;
    }
  }
  return entries.pickle != nullptr ? std::optional<Entries>(entries) : std::nullopt;
}

uint64_t next_header(const ZipDirectory& directory, const ZipEntry& entry) {
  uint64_t next = directory.begin;
  for (const ZipEntry& other : directory.entries) {
    if (other.header_offset > entry.header_offset) next = std::min(next, other.header_offset);
  }
  return next;
}

// The last bytes before `end`, from whichever window holds them; empty if neither does.
Bytes bytes_before(uint64_t end, uint64_t count, const Bytes& head, const Bytes& tail, uint64_t length) {
  count = std::min(count, end);
  if (end <= head.size()) return {head.data() + (end - count), count};
  const uint64_t tail_begin = length - tail.size();
  if (end - count >= tail_begin) return {tail.data() + (end - count - tail_begin), count};
  return {};
}

enum class Place { kFilled, kWrong, kNeedsTail };

// Checks that an entry's data ends where the next entry begins, but for the data descriptor. Only the local header
// tells where the data begins, and damage to it would shift the tensor. The descriptors of torch have a known size.
// Other writers of zip files choose among several sizes, so their descriptor itself must confirm its size.
Place check_place(const Bytes& head, const Bytes& tail, uint64_t length, const ZipEntry& entry, uint64_t data,
                  uint64_t next) {
  const uint64_t end = data + entry.size;
  if (end > next || next - end > kMaxDescriptor) return Place::kWrong;
  const uint64_t gap = next - end;
  if (!entry.has_descriptor) return gap == 0 ? Place::kFilled : Place::kWrong;
  if (gap == torch_descriptor_size(entry) && is_padded_by_torch(head, entry)) return Place::kFilled;
  const Bytes bytes = bytes_before(next, kMaxDescriptor, head, tail, length);
  if (bytes.size() == 0) return Place::kNeedsTail;
  return find_descriptor(bytes, entry) == gap ? Place::kFilled : Place::kWrong;
}

// Bytes from the storage's start to past the tensor's last element; nullopt if that overflows.
std::optional<int64_t> storage_span(const PickledTensor& tensor) {
  // This comes first: the offset and strides of an empty tensor may be anything.
  if (std::find(tensor.sizes.begin(), tensor.sizes.end(), 0) != tensor.sizes.end()) return 0;
  int64_t last = tensor.storage_offset;
  for (size_t i = 0; i < tensor.sizes.size(); ++i) {
    int64_t extent = 0;
    if (__builtin_mul_overflow(tensor.sizes[i] - 1, tensor.strides[i], &extent) ||
        __builtin_add_overflow(last, extent, &last)) {
      return std::nullopt;
    }
  }
  int64_t bytes = 0;
  if (__builtin_add_overflow(last, 1, &last) || __builtin_mul_overflow(last, info(tensor.dtype).itemsize, &bytes)) {
    return std::nullopt;
  }
  return bytes;
}

}  // namespace

ParsedRecord parse_record(Bytes head, Bytes tail, int64_t length, PickleCache& pickles) {
  const auto size = static_cast<uint64_t>(length);
  const ZipTail zip = parse_zip_tail(tail, size);
  if (zip.status == ZipTail::Status::kNeedsMore) return needs_more(head, tail, 0, zip.needed, length);
  if (zip.status == ZipTail::Status::kUnknown) return unknown("no zip directory as torch.save writes it");
  const std::optional<Entries> entries = sort_entries(zip.directory);
  if (!entries) return unknown("archive entries that a plain tensor does not have");

  // If another read is needed, it brings all that is: the pickle, the byte order and the local header of the payload.
  uint64_t head_needed = 0;
  const auto need = [&head_needed, &head](const ZipEntry& entry, uint64_t data_bytes) {
    const std::optional<uint64_t> data = local_data_offset(head, entry);
    if (local_header_end(entry) + kExtraHeads > head.size()) {
      // Without the header the size of its extra field is a guess: torch pads to the storage alignment.
      head_needed = std::max(
          head_needed, local_header_end(entry) + kExtraHeads + (data_bytes > 0 ? 4 * kHeadBytes + data_bytes : 0));
    } else if (data && data_bytes > 0 && *data + data_bytes > head.size()) {
      head_needed = std::max(head_needed, *data + data_bytes);
    }
  };
  need(*entries->pickle, entries->pickle->size);
  if (entries->byteorder != nullptr) need(*entries->byteorder, entries->byteorder->size);
  if (entries->storages.size() == 1) need(*entries->storages[0], 0);
  if (head_needed > 0) return needs_more(head, tail, head_needed, tail.size(), length);

  const std::optional<uint64_t> pickle_offset = local_data_offset(head, *entries->pickle);
  if (!pickle_offset || *pickle_offset + entries->pickle->size > head.size()) return unknown("no header for data.pkl");
  const Bytes pickle(head.data() + *pickle_offset, entries->pickle->size);
  const PickledTensor* tensor = pickles.find(pickle, entries->pickle->crc32);
  if (tensor == nullptr && entries->pickle->crc32 != 0 &&
      crc32(pickle.data(), pickle.size()) != entries->pickle->crc32) {
    ParsedRecord parsed = corrupt("the checksum of data.pkl is wrong");
    parsed.status = Status::kCorruptPickle;
    return parsed;
  }
  if (entries->byteorder != nullptr) {
    const std::optional<uint64_t> offset = local_data_offset(head, *entries->byteorder);
    if (!offset || *offset + entries->byteorder->size > head.size()) return unknown("no header for byteorder");
    head.seek(*offset);
    if (head.text(entries->byteorder->size) != "little") return unknown("not little-endian");
  }
  if (tensor == nullptr) {
    std::optional<PickledTensor> parsed = parse_tensor_pickle(pickle);
    if (!parsed) return unknown("not the pickle of a plain tensor");
    tensor = pickles.keep(pickle, entries->pickle->crc32, std::move(*parsed));
  }

  if (entries->storages.size() != 1) return unknown("not exactly one storage");
  const ZipEntry& storage = *entries->storages[0];
  const std::string expected = "/data/" + tensor->storage_key;
  if (storage.name.size() < expected.size() || storage.name.substr(storage.name.find('/')) != expected) {
    return unknown("the pickle names another storage");
  }
  if (storage.size != static_cast<uint64_t>(tensor->storage_bytes)) {
    return corrupt("data.pkl says " + std::to_string(tensor->storage_bytes) + " bytes of storage, the archive holds " +
                   std::to_string(storage.size));
  }
  const std::optional<uint64_t> data = local_data_offset(head, storage);
  if (!data) return corrupt("the local header of the storage is damaged");
  if (*data > zip.directory.begin || storage.size > zip.directory.begin - *data) {
    return corrupt("the storage reaches past its archive");
  }
  const uint64_t next = next_header(zip.directory, storage);
  const Place place = check_place(head, tail, size, storage, *data, next);
  if (place == Place::kNeedsTail) return needs_more(head, tail, 0, size - next + kMaxDescriptor, length);
  if (place == Place::kWrong) {
    return corrupt("the local header of the storage points to another place than the directory");
  }
  const std::optional<int64_t> span = storage_span(*tensor);
  if (!span || *span > tensor->storage_bytes) return corrupt("the tensor reaches past its storage");

  ParsedRecord parsed;
  parsed.status = Status::kTensor;
  parsed.layout.dtype = tensor->dtype;
  parsed.layout.begin = static_cast<int64_t>(*data);
  if (*span > 0) parsed.layout.begin += tensor->storage_offset * info(tensor->dtype).itemsize;
  parsed.layout.sizes = tensor->sizes;
  parsed.layout.strides = tensor->strides;
  return parsed;
}

}  // namespace dcp_fast::checkpoint
