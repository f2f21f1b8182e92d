// Strided tensors, element by element: the slow and obvious way that the real copies are compared with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "random.h"

namespace dcp_fast::testing {

using Ints = std::vector<int64_t>;

inline int64_t dot(const Ints& a, const Ints& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), int64_t{0});
}

// Calls f(index) for every index of a tensor of these sizes, the last dimension fastest.
template <typename Function>
void for_each_index(const Ints& sizes, const Function& f) {
  for (const int64_t size : sizes) {
    if (size == 0) return;
  }
  Ints index(sizes.size(), 0);
  for (;;) {
    f(index);
    size_t dim = sizes.size();
    while (dim > 0 && ++index[dim - 1] == sizes[dim - 1]) index[--dim] = 0;
    if (dim == 0) return;
  }
}

inline Ints contiguous_strides(const Ints& sizes) {
  Ints strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(1, sizes[i - 1]);
  return strides;
}

// Elements from the first to past the last one; 0 for a tensor without elements.
inline int64_t span_of(const Ints& sizes, const Ints& strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

// Strides of a tensor whose elements do not share memory: dimensions in any order, sometimes with padding.
inline Ints random_strides(Random& random, const Ints& sizes) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (random.chance(60)) {
    std::reverse(order.begin(), order.end());
  } else {
    random.shuffle(order);
  }
  const int padding = random.chance(50) ? 0 : 40;
  Ints strides(sizes.size());
  int64_t next = random.chance(padding) ? random.between(2, 3) : 1;
  for (const size_t dim : order) {
    strides[dim] = next;
    next *= std::max<int64_t>(1, sizes[dim]);
    if (random.chance(padding)) next += random.between(1, 9);
  }
  return strides;
}

inline Ints random_sizes(Random& random, size_t dims, int64_t low, int64_t high) {
  Ints sizes(dims);
  for (int64_t& size : sizes) size = random.between(low, high);
  return sizes;
}

}  // namespace dcp_fast::testing
