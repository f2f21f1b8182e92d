// Bytes in a heap block of exactly their size, so that the address sanitizer sees every step past either end.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <string_view>

#include "checkpoint/bytes.h"

namespace dcp_fast::testing {

class Exact {
 public:
  explicit Exact(std::string_view bytes) : data_(new std::byte[bytes.size()]), size_(bytes.size()) {
    if (size_ > 0) std::memcpy(data_.get(), bytes.data(), size_);
  }
  checkpoint::Bytes view() const { return {data_.get(), size_}; }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  std::unique_ptr<std::byte[]> data_;
  size_t size_;
};

}  // namespace dcp_fast::testing
