// The parts of the zip format that torch.save writes: stored entries, found through the central directory.
// Format: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its
// end, with zip64), 4.5.3 (zip64 extra field).
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "checkpoint/bytes.h"

namespace dcp_fast::checkpoint {

struct ZipEntry {
  std::string_view name;
  uint32_t crc32 = 0;  // 0 where the writer was told not to compute it
  uint64_t size = 0;   // bytes, stored without compression
  uint64_t header_offset = 0;
  bool has_descriptor = false;  // checksum and sizes follow the data
};

struct ZipDirectory {
  std::vector<ZipEntry> entries;  // views into the tail that it was parsed from
  uint64_t begin = 0;             // where the directory starts: no entry reaches past it
};

struct ZipTail {
  enum class Status { kParsed, kNeedsMore, kUnknown };
  Status status = Status::kUnknown;
  uint64_t needed = 0;  // kNeedsMore: how many of the archive's last bytes it takes
  ZipDirectory directory;
};

// Parses the directory of an archive of `archive_size` bytes, of which `tail` holds the last ones.
// kUnknown: not an archive, or one that uses what torch.save never does.
ZipTail parse_zip_tail(Bytes tail, uint64_t archive_size);

// The offset of an entry's data within the archive, or nullopt if `head` (the archive's first bytes) holds no valid
// local header for it.
std::optional<uint64_t> local_data_offset(Bytes head, const ZipEntry& entry);

// The bytes of the archive's start that local_data_offset needs for this entry.
uint64_t local_header_end(const ZipEntry& entry);

// What is_padded_by_torch needs beyond that.
inline constexpr uint64_t kExtraHeads = 4 + 16 + 4;

// Whether the extra field of an entry's local header ends in the padding that torch.save writes. The padding has a
// length of its own, which vouches for that of the extra field, and so for local_data_offset.
bool is_padded_by_torch(Bytes head, const ZipEntry& entry);

// The size of the data descriptor that torch.save writes for an entry.
uint64_t torch_descriptor_size(const ZipEntry& entry);
inline constexpr uint64_t kMaxDescriptor = 24;

// The size of the data descriptor at the end of `bytes`, the last ones before the next header. The format allows four,
// with or without signature and with sizes of 32 or 64 bits; only one can fit the entry. nullopt if none does.
std::optional<uint64_t> find_descriptor(Bytes bytes, const ZipEntry& entry);

// CRC-32 as zip uses it (reflected polynomial 0xEDB88320).
uint32_t crc32(const std::byte* data, size_t size);

}  // namespace dcp_fast::checkpoint
