#include "metadata/text.h"

#include <cstdint>
#include <cstring>

namespace dcp_fast::metadata {

namespace {

uint8_t byte_at(std::string_view text, size_t i) { return static_cast<uint8_t>(text[i]); }

bool is_continuation(std::string_view text, size_t i) { return i < text.size() && (byte_at(text, i) & 0xc0) == 0x80; }

// The length of the UTF-8 sequence at `i`, which is not ASCII; 0 if it is none.
size_t sequence_length(std::string_view text, size_t i) {
  const uint8_t first = byte_at(text, i);
  if (!is_continuation(text, i + 1)) return 0;
  const uint8_t second = byte_at(text, i + 1);
  if (first >= 0xc2 && first <= 0xdf) return 2;
  if (!is_continuation(text, i + 2)) return 0;
  if (first >= 0xe0 && first <= 0xef) return first == 0xe0 && second < 0xa0 ? 0 : 3;
  if (!is_continuation(text, i + 3)) return 0;
  if (first == 0xf0) return second >= 0x90 ? 4 : 0;
  if (first >= 0xf1 && first <= 0xf3) return 4;
  return first == 0xf4 && second < 0x90 ? 4 : 0;
}

}  // namespace

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    uint64_t word = 0;
    if (i + sizeof word <= text.size()) {
      std::memcpy(&word, text.data() + i, sizeof word);
      if ((word & 0x8080808080808080U) == 0) {
        i += sizeof word;
        continue;
      }
    }
    if (byte_at(text, i) < 0x80) {
      ++i;
      continue;
    }
    const size_t length = sequence_length(text, i);
    if (length == 0) return false;
    i += length;
  }
  return true;
}

}  // namespace dcp_fast::metadata
