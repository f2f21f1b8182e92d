// Where in its file the unpickler is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "little_endian.h"
#include "metadata/failure.h"
#include "metadata/source.h"

namespace dcp_fast::metadata {

class Cursor {
 public:
  explicit Cursor(Source& source) : source_(source), size_(source.size()) {}

  uint64_t size() const { return size_; }
  uint64_t position() const { return window_end_ - static_cast<uint64_t>(window_.end - window_.begin); }
  uint64_t left() const { return size_ - position(); }

  void seek(uint64_t position) {
    if (window_begin_ != nullptr && window_end_ - position <= static_cast<uint64_t>(window_.end - window_begin_)) {
      window_.begin = window_.end - (window_end_ - position);
      return;
    }
    window_ = {};
    window_begin_ = nullptr;
    window_end_ = position;
  }

  // Whether the next byte is this one; it is not taken.
  bool next_is(uint8_t byte) { return left() > 0 && *window(1).begin == byte; }

  // All that takes throws Error(kCorruptMetadata) if the file ends before. What is returned is valid until the next
  // call of anything.

  void require(uint64_t count) {
    if (count <= left()) return;
    seek(size_);
    corrupt("the pickle ends early");
  }
  const uint8_t* take(uint64_t count) {
    if (count > available()) {
      require(count);
      refill(count);
    }
    const uint8_t* begin = window_.begin;
    window_.begin += count;
    return begin;
  }
  // The length of a frame, of which all bytes must be there. Nothing else depends on it.
  void require_frame() {
    const uint64_t length = unsigned_integer(8);
    if (length > left()) corrupt("a frame beyond the end of the file");
  }
  uint64_t unsigned_integer(size_t width) { return from_little_endian(take(width), width); }
  // Up to and past the next newline, which is left out.
  std::string_view line() {
    for (uint64_t wanted = 1;;) {
      require(wanted);
      const Window bytes = window(wanted);
      const std::string_view text(reinterpret_cast<const char*>(bytes.begin),
                                  static_cast<size_t>(bytes.end - bytes.begin));
      const size_t count = text.find('\n');
      if (count != std::string_view::npos) return {reinterpret_cast<const char*>(take(count + 1)), count};
      // Twice as many: however long the line, it is not looked at more often than that takes.
      wanted = std::max<uint64_t>(available() + 1, std::min<uint64_t>(2 * available(), left()));
    }
  }

  // What comes next, at least `count` bytes of it or all that are left; nothing is taken.
  Window window(uint64_t count) {
    const uint64_t wanted = std::min(count, left());
    if (wanted > available()) refill(wanted);
    return window_;
  }
  // Takes what lies before `at` in the window.
  void advance_to(const uint8_t* at) { window_.begin = at; }

 private:
  uint64_t available() const { return static_cast<uint64_t>(window_.end - window_.begin); }
  void refill(uint64_t count) {
    const uint64_t at = position();
    window_ = source_.read(at, count);
    window_begin_ = window_.begin;
    window_end_ = at + available();
  }

  Source& source_;
  uint64_t size_;
  Window window_;  // the part not yet taken
  const uint8_t* window_begin_ = nullptr;
  uint64_t window_end_ = 0;  // a position
};

}  // namespace dcp_fast::metadata
