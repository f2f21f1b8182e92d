#include "checkpoint/zip.h"

#include <algorithm>
#include <array>

namespace dcp_fast::checkpoint {

namespace {

constexpr uint32_t kLocalHeader = 0x04034b50;
constexpr uint32_t kDirectoryEntry = 0x02014b50;
constexpr uint32_t kDescriptorSignature = 0x08074b50;
constexpr uint32_t kEnd = 0x06054b50;
constexpr uint32_t kZip64End = 0x06064b50;
constexpr uint32_t kZip64Locator = 0x07064b50;
constexpr size_t kLocalHeaderSize = 30;
constexpr size_t kEndSize = 22;
constexpr size_t kZip64EndSize = 56;
constexpr size_t kZip64LocatorSize = 20;
constexpr uint16_t kZip64Extra = 1;
constexpr uint16_t kTorchPadding = 'F' | 'B' << 8;
constexpr uint16_t kEncrypted = 1;
constexpr uint16_t kDescriptor = 8;
constexpr uint64_t kMaxEntries = 64;  // torch.save of one tensor writes seven

struct End {
  uint64_t entries = 0;
  uint64_t directory_size = 0;
  uint64_t directory_offset = 0;
  uint64_t size = 0;  // of the end records themselves, at the very end of the archive
};

std::optional<End> parse_end(Bytes tail, uint64_t archive_size) {
  if (tail.size() < kEndSize) return std::nullopt;
  const size_t end_position = tail.size() - kEndSize;
  tail.seek(end_position);
  if (tail.u32() != kEnd) return std::nullopt;
  const uint16_t disk = tail.u16();
  const uint16_t directory_disk = tail.u16();
  const uint16_t disk_entries = tail.u16();
  End end;
  end.entries = tail.u16();
  end.directory_size = tail.u32();
  end.directory_offset = tail.u32();
  const uint16_t comment = tail.u16();
  end.size = kEndSize;
  if (comment != 0 || disk != directory_disk || (disk != 0 && disk != 0xFFFF)) return std::nullopt;
  const bool needs_zip64 =
      end.entries == 0xFFFF || end.directory_size == 0xFFFFFFFF || end.directory_offset == 0xFFFFFFFF;
  // torch.save always writes the zip64 records, even where they are not needed.
  const bool room = end_position >= kZip64LocatorSize + kZip64EndSize;
  if (room) tail.seek(end_position - kZip64LocatorSize);
  if (!room || tail.u32() != kZip64Locator) {
    return !needs_zip64 && disk_entries == end.entries ? std::optional<End>(end) : std::nullopt;
  }
  tail.skip(4);
  const uint64_t zip64_offset = tail.u64();
  if (zip64_offset != archive_size - kEndSize - kZip64LocatorSize - kZip64EndSize) return std::nullopt;
  tail.seek(end_position - kZip64LocatorSize - kZip64EndSize);
  if (tail.u32() != kZip64End || tail.u64() != kZip64EndSize - 12) return std::nullopt;
  tail.skip(12);  // versions and disks
  End zip64;
  const uint64_t zip64_disk_entries = tail.u64();
  zip64.entries = tail.u64();
  zip64.directory_size = tail.u64();
  zip64.directory_offset = tail.u64();
  zip64.size = kEndSize + kZip64LocatorSize + kZip64EndSize;
  const auto agrees = [](uint64_t narrow, uint64_t saturated, uint64_t wide) {
    return narrow == saturated || narrow == wide;
  };
  const bool consistent = zip64_disk_entries == zip64.entries && agrees(end.entries, 0xFFFF, zip64.entries) &&
                          agrees(end.directory_size, 0xFFFFFFFF, zip64.directory_size) &&
                          agrees(end.directory_offset, 0xFFFFFFFF, zip64.directory_offset);
  return tail.ok() && consistent ? std::optional<End>(zip64) : std::nullopt;
}

// Takes the 64-bit values that replace saturated 32-bit ones from an entry's extra field.
bool apply_zip64_extra(Bytes extra, uint64_t& size, uint64_t& compressed, uint64_t& offset) {
  while (extra.ok() && extra.size() - extra.position() >= 4) {
    const uint16_t id = extra.u16();
    const uint16_t length = extra.u16();
    const size_t next = extra.position() + length;
    if (id == kZip64Extra) {
      if (size == 0xFFFFFFFF) size = extra.u64();
      if (compressed == 0xFFFFFFFF) compressed = extra.u64();
      if (offset == 0xFFFFFFFF) offset = extra.u64();
      return extra.ok() && extra.position() <= next;
    }
    extra.seek(next);
  }
  return false;
}

std::optional<ZipEntry> parse_directory_entry(Bytes& directory) {
  if (directory.u32() != kDirectoryEntry) return std::nullopt;
  directory.skip(4);  // versions
  const uint16_t flags = directory.u16();
  const uint16_t method = directory.u16();
  directory.skip(4);  // time and date
  ZipEntry entry;
  entry.crc32 = directory.u32();
  uint64_t compressed = directory.u32();
  entry.size = directory.u32();
  const uint16_t name_size = directory.u16();
  const uint16_t extra_size = directory.u16();
  const uint16_t comment_size = directory.u16();
  directory.skip(8);  // disk and attributes
  entry.header_offset = directory.u32();
  entry.name = directory.text(name_size);
  entry.has_descriptor = (flags & kDescriptor) != 0;
  const size_t extra_position = directory.position();
  directory.skip(extra_size);
  directory.skip(comment_size);
  if (!directory.ok() || method != 0 || (flags & kEncrypted) != 0) return std::nullopt;
  if (entry.size == 0xFFFFFFFF || compressed == 0xFFFFFFFF || entry.header_offset == 0xFFFFFFFF) {
    const Bytes extra(directory.data() + extra_position, extra_size);
    if (!apply_zip64_extra(extra, entry.size, compressed, entry.header_offset)) return std::nullopt;
  }
  return compressed == entry.size ? std::optional<ZipEntry>(entry) : std::nullopt;
}

std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < table.size(); ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? 0xEDB88320U : 0);
    table[i] = value;
  }
  return table;
}

}  // namespace

ZipTail parse_zip_tail(Bytes tail, uint64_t archive_size) {
  ZipTail result;
  const std::optional<End> end = parse_end(tail, archive_size);
  // The directory must fill the space up to its end records exactly: nothing hides in between.
  if (!end || end->entries > kMaxEntries || end->directory_size > archive_size ||
      end->directory_offset > archive_size || end->directory_offset + end->directory_size + end->size != archive_size) {
    return result;
  }
  const uint64_t needed = end->directory_size + end->size;
  if (needed > tail.size()) {
    result.status = ZipTail::Status::kNeedsMore;
    result.needed = needed;
    return result;
  }
  result.directory.entries.reserve(end->entries);
  Bytes directory(tail.data() + (tail.size() - needed), end->directory_size);
  for (uint64_t i = 0; i < end->entries; ++i) {
    const std::optional<ZipEntry> entry = parse_directory_entry(directory);
    if (!entry || entry->header_offset > end->directory_offset ||
        entry->size > end->directory_offset - entry->header_offset) {
      return result;
    }
    result.directory.entries.push_back(*entry);
  }
  if (directory.position() != directory.size()) return result;
  result.directory.begin = end->directory_offset;
  result.status = ZipTail::Status::kParsed;
  return result;
}

uint64_t local_header_end(const ZipEntry& entry) { return entry.header_offset + kLocalHeaderSize + entry.name.size(); }

std::optional<uint64_t> local_data_offset(Bytes head, const ZipEntry& entry) {
  if (entry.header_offset > head.size()) return std::nullopt;
  head.seek(entry.header_offset);
  if (head.u32() != kLocalHeader) return std::nullopt;
  head.skip(2);  // version
  const uint16_t flags = head.u16();
  const uint16_t method = head.u16();
  head.skip(16);  // time, date, crc and sizes, which stand in the data descriptor and the directory
  const uint16_t name_size = head.u16();
  const uint16_t extra_size = head.u16();
  const bool same_name = head.text(name_size) == entry.name;
  if (!head.ok() || !same_name || method != 0 || (flags & kEncrypted) != 0) return std::nullopt;
  return local_header_end(entry) + extra_size;
}

bool is_padded_by_torch(Bytes head, const ZipEntry& entry) {
  head.seek(entry.header_offset + kLocalHeaderSize - 2);
  const uint16_t extra_size = head.u16();
  head.skip(entry.name.size());
  uint64_t left = extra_size;
  while (head.ok() && left >= 4) {
    const uint16_t id = head.u16();
    const uint64_t size = 4 + uint64_t{head.u16()};
    if (id == kTorchPadding) return head.ok() && size == left;
    if (size > left) return false;
    left -= size;
    head.skip(size - 4);
  }
  return false;
}

uint64_t torch_descriptor_size(const ZipEntry& entry) {
  if (!entry.has_descriptor) return 0;
  return entry.size < 0xFFFFFFFF ? 16 : 24;
}

std::optional<uint64_t> find_descriptor(Bytes bytes, const ZipEntry& entry) {
  // The one with a signature is tried first: what follows the signature would fit as a descriptor without one.
  for (const bool signature : {true, false}) {
    for (const bool wide : {true, false}) {
      const uint64_t size = (signature ? 4U : 0U) + 4 + (wide ? 16 : 8);
      if (size > bytes.size()) continue;
      Bytes descriptor(bytes.data() + (bytes.size() - size), size);
      if (signature && descriptor.u32() != kDescriptorSignature) continue;
      if (descriptor.u32() != entry.crc32) continue;
      const uint64_t compressed = wide ? descriptor.u64() : descriptor.u32();
      const uint64_t uncompressed = wide ? descriptor.u64() : descriptor.u32();
      if (compressed == entry.size && uncompressed == entry.size) return size;
    }
  }
  return std::nullopt;
}

uint32_t crc32(const std::byte* data, size_t size) {
  static const std::array<uint32_t, 256> table = make_crc_table();
  uint32_t value = 0xFFFFFFFFU;
  for (size_t i = 0; i < size; ++i) {
    value = table[(value ^ static_cast<uint32_t>(data[i])) & 0xFFU] ^ (value >> 8);
  }
  return value ^ 0xFFFFFFFFU;
}

}  // namespace dcp_fast::checkpoint
