// Columns of integers, which Python hands over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dcp_fast {

// Walks a Python buffer of int64 with bounds checks.
class Column {
 public:
  explicit Column(const pybind11::buffer& buffer) : info_(buffer.request()) {
    if (info_.ndim != 1 || info_.itemsize != sizeof(int64_t) ||
        (info_.size > 1 && info_.strides[0] != sizeof(int64_t))) {
      throw pybind11::value_error("expected a contiguous buffer of 64-bit integers");
    }
  }
  bool done() const { return position_ == info_.size; }
  int64_t next() {
    if (done()) throw pybind11::value_error("the column ends within a row");
    return static_cast<const int64_t*>(info_.ptr)[position_++];
  }
  size_t next_index(size_t bound) {
    const int64_t value = next();
    if (value < 0 || static_cast<size_t>(value) >= bound) throw pybind11::index_error("index out of range in a column");
    return static_cast<size_t>(value);
  }
  std::vector<int64_t> next(size_t count) {
    if (count > static_cast<size_t>(info_.size - position_))
      throw pybind11::value_error("the column ends within a row");
    const auto* begin = static_cast<const int64_t*>(info_.ptr) + position_;
    position_ += static_cast<pybind11::ssize_t>(count);
    return {begin, begin + count};
  }
  size_t next_dims() {
    constexpr size_t kMaxDims = 64 + 1;  // torch's own limit is 64
    return next_index(kMaxDims);
  }

 private:
  pybind11::buffer_info info_;
  pybind11::ssize_t position_ = 0;
};

}  // namespace dcp_fast
