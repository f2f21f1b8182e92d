#include "checkpoint/archive.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "checkpoint/zip.h"

namespace dcp_fast::checkpoint {

namespace {

constexpr std::array<std::string_view, 6> kRecords = {
    "data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"};
constexpr std::string_view kStorages = "data/";

// Whether the directory is as torch.save writes it in what the parser for tensors does not look at, but torch does:
// flags, numbers of disks and attributes.
bool is_directory_of_torch(Bytes record, const ZipDirectory& directory) {
  constexpr uint16_t kFlags = 0x0808;  // names in UTF-8, descriptors behind the data
  constexpr size_t kEndSize = 56 + 20 + 22;
  record.seek(directory.begin);
  for (size_t i = 0; i < directory.entries.size(); ++i) {
    record.skip(8);  // signature and versions
    const uint16_t flags = record.u16();
    record.skip(18);  // method, time, date, checksum and sizes
    const size_t variable = size_t{record.u16()} + record.u16() + record.u16();
    const uint16_t disk = record.u16();
    const uint16_t internal = record.u16();
    const uint32_t external = record.u32();
    record.skip(4 + variable);
    if (flags != kFlags || disk != 0 || internal != 0 || external != 0) return false;
  }
  if (record.size() - record.position() != kEndSize) return false;
  record.skip(16);
  const uint64_t disks = record.u64();
  record.skip(32 + 4);
  const uint32_t end_disk = record.u32();
  record.skip(8);
  return record.u32() == 1 && disks == 0 && end_disk == 0 && record.ok();
}

// As torch reads it (caffe2/serialize/versions.h): 1 to 10.
bool is_version_of_torch(std::string_view text) {
  if (text.empty() || text.back() != '\n') return false;
  text.remove_suffix(1);
  return text == "10" || (text.size() == 1 && text[0] >= '1' && text[0] <= '9');
}

// The content of an entry, if what surrounds it is as torch.save writes it: padding in front, a descriptor behind.
std::optional<Bytes> content_of(Bytes record, const ZipDirectory& directory, const ZipEntry& entry) {
  const std::optional<uint64_t> data = local_data_offset(record, entry);
  if (!data || *data > directory.begin || entry.size > directory.begin - *data) return std::nullopt;
  uint64_t next = directory.begin;
  for (const ZipEntry& other : directory.entries) {
    if (other.header_offset > entry.header_offset) next = std::min(next, other.header_offset);
  }
  const uint64_t end = *data + entry.size;
  if (end > next || next - end != torch_descriptor_size(entry) || !is_padded_by_torch(record, entry)) {
    return std::nullopt;
  }
  return Bytes(record.data() + *data, entry.size);
}

bool adds_storage(Archive& archive, std::string_view key, const Bytes& record, const Bytes& content) {
  const auto same_key = [key](const Archive::Storage& other) { return other.key == key; };
  if (std::any_of(archive.storages.begin(), archive.storages.end(), same_key)) return false;
  archive.storages.push_back({key, static_cast<size_t>(content.data() - record.data()), content.size()});
  return true;
}

}  // namespace

std::optional<Archive> find_archive(Bytes record) {
  const ZipTail zip = parse_zip_tail(record, record.size());
  if (zip.status != ZipTail::Status::kParsed || zip.directory.entries.empty()) return std::nullopt;
  if (!is_directory_of_torch(record, zip.directory)) return std::nullopt;
  const std::string_view first = zip.directory.entries[0].name;
  const std::string_view folder = first.substr(0, first.find('/') + 1);
  Archive archive;
  std::array<std::optional<Bytes>, kRecords.size()> contents;
  for (const ZipEntry& entry : zip.directory.entries) {
    if (folder.empty() || entry.name.substr(0, folder.size()) != folder) return std::nullopt;
    const std::optional<Bytes> content = content_of(record, zip.directory, entry);
    if (!content) return std::nullopt;
    const std::string_view name = entry.name.substr(folder.size());
    if (name.substr(0, kStorages.size()) == kStorages) {
      if (!adds_storage(archive, name.substr(kStorages.size()), record, *content)) return std::nullopt;
      continue;
    }
    const auto* known = std::find(kRecords.begin(), kRecords.end(), name);
    if (known == kRecords.end()) return std::nullopt;
    // 0 where the writer was told not to compute it, or else by chance.
    if (entry.crc32 == 0) {
      archive.has_checksums = false;
    } else if (crc32(content->data(), content->size()) != entry.crc32) {
      return std::nullopt;
    }
    std::optional<Bytes>& place = contents[static_cast<size_t>(known - kRecords.begin())];
    if (place) return std::nullopt;
    place = content;
  }
  auto& [pickle, version, byteorder, format_version, alignment, id] = contents;
  if (!pickle || !version || !is_version_of_torch(version->text(version->size()))) return std::nullopt;
  if (byteorder && byteorder->text(byteorder->size()) != "little") return std::nullopt;
  // Without it, a setting of the process that loads says in which order the bytes of storages are.
  if (!byteorder && !archive.storages.empty()) return std::nullopt;
  archive.pickle = *pickle;
  return archive;
}

}  // namespace dcp_fast::checkpoint
