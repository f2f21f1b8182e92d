// Distinct texts, numbered in the order in which they came.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "metadata/hash_table.h"

namespace dcp_fast::metadata {

class TextTable {
 public:
  static constexpr uint32_t kNone = HashTable::kNone;

  size_t size() const { return ends_.size(); }
  std::string_view operator[](size_t index) const {
    const size_t begin = index == 0 ? 0 : ends_[index - 1];
    return std::string_view(bytes_).substr(begin, ends_[index] - begin);
  }

  // kNone if the text is not there.
  uint32_t find(std::string_view text) const;
  // The same, and in less time if it is the text of that number.
  uint32_t find(std::string_view text, uint32_t likely) const {
    return likely < size() && (*this)[likely] == text ? likely : find(text);
  }

  // The text's number, which is a new one if it was not there.
  uint32_t add(std::string_view text);

 private:
  std::string bytes_;
  std::vector<size_t> ends_;
  HashTable table_;
  size_t capacity_ = 0;
};

}  // namespace dcp_fast::metadata
