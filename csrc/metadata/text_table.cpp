#include "metadata/text_table.h"

#include <algorithm>

#include "metadata/failure.h"
#include "metadata/hash.h"

namespace dcp_fast::metadata {

uint32_t TextTable::find(std::string_view text) const {
  return table_.find(hash(text), [&](uint32_t row) { return (*this)[row] == text; });
}

uint32_t TextTable::add(std::string_view text) {
  if (size() == capacity_) {
    if (size() >= kNone / 2) unsupported("more texts than 31 bits count");
    capacity_ = std::max<size_t>(16, 2 * capacity_);
    table_.reserve(capacity_);
    const auto never = [](uint32_t) { return false; };
    for (uint32_t row = 0; row < size(); ++row) table_.find_or_add(hash((*this)[row]), row, never);
  }
  const auto fresh = static_cast<uint32_t>(size());
  const uint32_t found = table_.find_or_add(hash(text), fresh, [&](uint32_t row) { return (*this)[row] == text; });
  if (found != kNone) return found;
  bytes_ += text;
  ends_.push_back(bytes_.size());
  return fresh;
}

}  // namespace dcp_fast::metadata
