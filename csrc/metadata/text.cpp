#include "metadata/text.h"

#include <cstdint>
#include <cstring>
#include <optional>

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

void append_utf8(uint32_t point, std::string& text) {
  const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (point >> shift & 0x3f)); };
  if (point < 0x80) {
    text += static_cast<char>(point);
  } else if (point < 0x800) {
    text += static_cast<char>(0xc0 | point >> 6);
    tail(0);
  } else if (point < 0x10000) {
    text += static_cast<char>(0xe0 | point >> 12);
    tail(6);
    tail(0);
  } else {
    text += static_cast<char>(0xf0 | point >> 18);
    tail(12);
    tail(6);
    tail(0);
  }
}

std::optional<uint32_t> hexadecimal(std::string_view digits) {
  uint32_t value = 0;
  for (const char digit : digits) {
    value <<= 4;
    if (digit >= '0' && digit <= '9') {
      value |= static_cast<uint32_t>(digit - '0');
    } else if (digit >= 'a' && digit <= 'f') {
      value |= static_cast<uint32_t>(digit - 'a' + 10);
    } else if (digit >= 'A' && digit <= 'F') {
      value |= static_cast<uint32_t>(digit - 'A' + 10);
    } else {
      return std::nullopt;
    }
  }
  return value;
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

bool append_decoded(std::string_view escaped, std::string& text) {
  for (size_t i = 0; i < escaped.size();) {
    // Only an odd backslash of a row starts an escape; of other escapes the backslash stands for itself.
    const bool escapes =
        escaped[i] == '\\' && i + 1 < escaped.size() && (escaped[i + 1] == 'u' || escaped[i + 1] == 'U');
    if (escaped[i] == '\\' && i + 1 < escaped.size() && !escapes) {
      append_utf8(byte_at(escaped, i), text);
      append_utf8(byte_at(escaped, i + 1), text);
      i += 2;
      continue;
    }
    if (!escapes) {
      append_utf8(byte_at(escaped, i++), text);
      continue;
    }
    const size_t digits = escaped[i + 1] == 'u' ? 4 : 8;
    if (escaped.size() - i - 2 < digits) return false;
    const auto point = hexadecimal(escaped.substr(i + 2, digits));
    if (!point || *point > 0x10ffff) return false;
    append_utf8(*point, text);
    i += 2 + digits;
  }
  return true;
}

}  // namespace dcp_fast::metadata
