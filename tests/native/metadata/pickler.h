// Writes metadata as Python's pickler does: in batches, and with a memo of all that it writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "metadata/metadata_pickle.h"

namespace dcp_fast::testing {

class Pickler {
 public:
  explicit Pickler(int protocol) : protocol_(protocol) {
    pickle_ = std::string("\x80") + static_cast<char>(protocol);
    object(kCheckpoint, "Metadata");
    pickle_ += '}';
    put();
    pickle_ += '(';
  }

  std::string finish() { return pickle_ + "ub."; }
  std::string& pickle() { return pickle_; }

  // Each returns the index in the memo.
  uint32_t put() {
    if (protocol_ >= 4) {
      pickle_ += '\x94';
    } else {
      pickle_ += next_ < 256 ? "q" + little_endian(next_, 1) : "r" + little_endian(next_, 4);
    }
    return next_++;
  }
  uint32_t text(std::string_view value) {
    if (protocol_ >= 4 && value.size() < 256) {
      pickle_ += "\x8c" + little_endian(value.size(), 1) + std::string(value);
    } else {
      pickle_ += testing::text(value);
    }
    return put();
  }
  // torch.Size
  uint32_t size(const std::vector<int64_t>& numbers) {
    global("torch", "Size");
    if (numbers.size() > 3) pickle_ += '(';
    for (const int64_t value : numbers) number(value);
    if (numbers.empty()) {
      pickle_ += ')';
    } else {
      pickle_ += numbers.size() > 3 ? 't' : static_cast<char>(0x84 + numbers.size());
      put();
    }
    pickle_ += '\x85';
    put();
    pickle_ += 'R';
    return put();
  }

  void get(uint32_t index) { pickle_ += index < 256 ? "h" + little_endian(index, 1) : "j" + little_endian(index, 4); }
  // A text that is the same object wherever it is written.
  void name(const std::string& value) {
    const auto known = names_.find(value);
    if (known != names_.end()) {
      get(known->second);
    } else {
      names_[value] = text(value);
    }
  }
  void global(std::string_view module, std::string_view name) {
    const std::string both = std::string(module) + ' ' + std::string(name);
    const auto known = names_.find(both);
    if (known != names_.end()) {
      get(known->second);
      return;
    }
    pickle_ += testing::global(module, name);
    names_[both] = put();
  }
  void object(std::string_view module, std::string_view name) {
    global(module, name);
    pickle_ += ")\x81";
    put();
  }
  // With the mark for its fields.
  void begin_object(std::string_view module, std::string_view name) {
    object(module, name);
    pickle_ += '}';
    put();
    pickle_ += '(';
  }
  void number(int64_t value) {
    if (value >= 0 && value < 256) {
      pickle_ += "K" + little_endian(static_cast<uint64_t>(value), 1);
    } else if (value >= 0 && value < 65536) {
      pickle_ += "M" + little_endian(static_cast<uint64_t>(value), 2);
    } else if (value >= INT32_MIN && value <= INT32_MAX) {
      pickle_ += "J" + little_endian(static_cast<uint64_t>(value), 4);
    } else {
      size_t width = 5;
      while (width < 8 && value >> (8 * width - 1) != value >> 63) ++width;
      pickle_ += "\x8a" + little_endian(width, 1) + little_endian(static_cast<uint64_t>(value), width);
    }
  }

 private:
  int protocol_;
  std::string pickle_;
  uint32_t next_ = 0;
  std::map<std::string, uint32_t> names_;
};

}  // namespace dcp_fast::testing
