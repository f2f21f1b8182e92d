#include "metadata/json.h"

#include <cmath>
#include <cstdlib>
#include <limits>

#include "error.h"
#include "metadata/text.h"

namespace dcp_fast::metadata {

namespace {

constexpr uint32_t kFirstHighSurrogate = 0xd800;
constexpr uint32_t kFirstLowSurrogate = 0xdc00;
constexpr uint32_t kPastSurrogates = 0xe000;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& text, uint32_t code) {
  const auto put = [&text](uint32_t byte) { text += static_cast<char>(byte); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xc0 | code >> 6);
  } else {
    if (code < 0x10000) {
      put(0xe0 | code >> 12);
    } else {
      put(0xf0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3f));
    }
    put(0x80 | (code >> 6 & 0x3f));
  }
  put(0x80 | (code & 0x3f));
}

}  // namespace

bool Json::is_text(std::string_view bytes) {
  if (!is_utf8(bytes)) return false;
  for (size_t i = bytes.find('\xed'); i != std::string_view::npos; i = bytes.find('\xed', i + 1)) {
    if (static_cast<uint8_t>(bytes[i + 1]) >= 0xa0) return false;
  }
  return true;
}

void Json::fail(const std::string& reason) const { throw Error(ErrorKind::kCorruptHeader, reason, "", position(), 0); }

char Json::peek() {
  while (position_ < text_.size()) {
    const char c = text_[position_];
    if (c != ' ' && c != '\n' && c != '\t' && c != '\r') return c;
    ++position_;
  }
  return 0;
}

bool Json::take(char expected) {
  if (peek() != expected) return false;
  ++position_;
  return true;
}

bool Json::take_word(std::string_view word) {
  peek();
  if (text_.substr(position_, word.size()) != word) return false;
  position_ += word.size();
  return true;
}

void Json::expect(char expected) {
  if (!take(expected)) fail(std::string("the JSON lacks a ") + expected);
}

void Json::begin(char opening, const char* what) {
  if (!take(opening)) fail(std::string("the JSON has something else where ") + what + " belongs");
  if (++depth_ > kMostDepth) fail("the JSON is nested too deeply");
}

std::string Json::string() {
  if (!take('"')) fail("the JSON has something else where a string belongs");
  std::string result;
  for (;;) {
    const size_t begin = position_;
    while (position_ < text_.size() && text_[position_] != '"' && text_[position_] != '\\' &&
           static_cast<uint8_t>(text_[position_]) >= 0x20) {
      ++position_;
    }
    result.append(text_, begin, position_ - begin);
    if (position_ == text_.size()) fail("the JSON ends within a string");
    const char c = text_[position_];
    if (c == '"') break;
    if (c != '\\') fail("the JSON has a control character in a string");
    ++position_;
    escape(result);
  }
  ++position_;
  return result;
}

std::string Json::key() {
  std::string result = string();
  expect(':');
  return result;
}

void Json::escape(std::string& result) {
  const char c = position_ < text_.size() ? text_[position_++] : '\0';
  constexpr std::string_view kNames = "\"\\/bfnrt";
  constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
  const size_t known = c == '\0' ? std::string_view::npos : kNames.find(c);
  if (known != std::string_view::npos) {
    result += kValues[known];
    return;
  }
  if (c != 'u') fail("the JSON has an unknown escape in a string");
  uint32_t code = hex();
  if (code >= kFirstLowSurrogate && code < kPastSurrogates) fail("the JSON has a lone surrogate in a string");
  if (code >= kFirstHighSurrogate && code < kFirstLowSurrogate) {
    if (text_.substr(position_, 2) != "\\u") fail("the JSON has a lone surrogate in a string");
    position_ += 2;
    const uint32_t low = hex();
    if (low < kFirstLowSurrogate || low >= kPastSurrogates) fail("the JSON has a lone surrogate in a string");
    code = 0x10000 + ((code - kFirstHighSurrogate) << 10) + (low - kFirstLowSurrogate);
  }
  append_utf8(result, code);
}

uint32_t Json::hex() {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) {
    const char c = position_ < text_.size() ? text_[position_] : '\0';
    uint32_t digit = 0;
    if (is_digit(c)) {
      digit = static_cast<uint32_t>(c - '0');
    } else if ((c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F')) {
      digit = static_cast<uint32_t>((c | 0x20) - 'a') + 10;
    } else {
      fail("the JSON has an unknown escape in a string");
    }
    value = value << 4 | digit;
    ++position_;
  }
  return value;
}

size_t Json::digits() {
  const size_t begin = position_;
  while (position_ < text_.size() && is_digit(text_[position_])) ++position_;
  return position_ - begin;
}

int64_t Json::count() {
  peek();
  const size_t begin = position_;
  const size_t length = digits();
  const char next = position_ < text_.size() ? text_[position_] : '\0';
  const bool is_integer = length > 0 && (length == 1 || text_[begin] != '0') && next != '.' && (next | 0x20) != 'e';
  if (!is_integer) {
    position_ = begin;
    fail("the JSON has something else where a number of elements or bytes belongs");
  }
  int64_t value = 0;
  for (size_t i = begin; i < position_; ++i) {
    if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, text_[i] - '0', &value)) {
      position_ = begin;
      fail("the JSON has a number that 63 bits do not hold");
    }
  }
  return value;
}

void Json::skip_number() {
  const size_t begin = position_;
  if (text_[position_] == '-') ++position_;
  const size_t first = position_;
  const size_t whole = digits();
  bool is_sound = whole > 0 && (whole == 1 || text_[first] != '0');
  if (is_sound && position_ < text_.size() && text_[position_] == '.') {
    ++position_;
    is_sound = digits() > 0;
  }
  if (is_sound && position_ < text_.size() && (text_[position_] | 0x20) == 'e') {
    ++position_;
    if (position_ < text_.size() && (text_[position_] == '+' || text_[position_] == '-')) ++position_;
    is_sound = digits() > 0;
  }
  if (!is_sound) fail("the JSON has something that is no value");
  const std::string number(text_.substr(begin, position_ - begin));
  if (!std::isfinite(std::strtod(number.c_str(), nullptr))) fail("the JSON has a number that no float holds");
}

void Json::skip() {
  switch (peek()) {
    case '{':
      return object([this](const std::string&) { skip(); });
    case '[':
      return array([this] { skip(); });
    case '"':
      string();
      return;
    case '-':
    case '0':
    case '1':
    case '2':
    case '3':
    case '4':
    case '5':
    case '6':
    case '7':
    case '8':
    case '9':
      return skip_number();
    default:
      if (!take_word("true") && !take_word("false") && !take_word("null"))
        fail("the JSON has something that is no value");
  }
}

void Json::finish() {
  peek();
  if (position_ != text_.size()) fail("something follows the JSON");
}

}  // namespace dcp_fast::metadata
