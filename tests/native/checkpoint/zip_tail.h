// Ends of zip archives with every field chosen, also those of archives too large to write to a disk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "archive_builder.h"

namespace dcp_fast::testing {

// A central directory entry with every field chosen.
struct RawEntry {
  std::string name;
  uint64_t size = 0;
  uint64_t header_offset = 0;
  uint64_t compressed = UINT64_MAX;  // as `size`
  uint16_t method = 0;
  uint16_t flags = 0x808;
  std::string foreign_extra = {};  // before the zip64 one
  bool zip64_extra = true;
};

inline std::string directory_entry(const RawEntry& entry) {
  constexpr uint64_t kFull = 0xFFFFFFFF;
  const uint64_t compressed = entry.compressed == UINT64_MAX ? entry.size : entry.compressed;
  std::string wide;
  for (const uint64_t value : {entry.size, compressed, entry.header_offset}) {
    if (value >= kFull) append(wide, value, 8);
  }
  std::string extra = entry.foreign_extra;
  if (!wide.empty() && entry.zip64_extra) {
    append(extra, 1, 2);
    append(extra, wide.size(), 2);
    extra += wide;
  }
  std::string bytes;
  append(bytes, 0x02014b50, 4);
  append(bytes, 0, 4);
  append(bytes, entry.flags, 2);
  append(bytes, entry.method, 2);
  append(bytes, 0, 4);
  append(bytes, 0x12345678, 4);
  append(bytes, std::min(compressed, kFull), 4);
  append(bytes, std::min(entry.size, kFull), 4);
  append(bytes, entry.name.size(), 2);
  append(bytes, extra.size(), 2);
  append(bytes, 0, 10);
  append(bytes, std::min(entry.header_offset, kFull), 4);
  return bytes + entry.name + extra;
}

// The tail of an archive whose directory starts at `begin`: far beyond what a test would write to a disk.
struct Tail {
  std::string bytes;
  uint64_t archive_size;
};

inline Tail make_tail(const std::vector<RawEntry>& entries, uint64_t begin, bool zip64 = true) {
  Tail tail;
  for (const RawEntry& entry : entries) tail.bytes += directory_entry(entry);
  const uint64_t size = tail.bytes.size();
  const uint64_t end = begin + size;
  if (zip64) {
    append(tail.bytes, 0x06064b50, 4);
    append(tail.bytes, 44, 8);
    append(tail.bytes, 0, 12);
    append(tail.bytes, entries.size(), 8);
    append(tail.bytes, entries.size(), 8);
    append(tail.bytes, size, 8);
    append(tail.bytes, begin, 8);
    append(tail.bytes, 0x07064b50, 4);
    append(tail.bytes, 0, 4);
    append(tail.bytes, end, 8);
    append(tail.bytes, 1, 4);
  }
  append(tail.bytes, 0x06054b50, 4);
  append(tail.bytes, 0, 4);
  append(tail.bytes, entries.size(), 2);
  append(tail.bytes, entries.size(), 2);
  append(tail.bytes, size, 4);
  append(tail.bytes, std::min<uint64_t>(begin, 0xFFFFFFFF), 4);
  append(tail.bytes, 0, 2);
  tail.archive_size = begin + tail.bytes.size();
  return tail;
}

}  // namespace dcp_fast::testing
