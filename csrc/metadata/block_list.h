// A growing array that never moves its items: growing a vector of hundreds of megabytes would for a moment take it
// twice. Fresh items are zero, and memory that was never written is never taken.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace dcp_fast::metadata {

template <typename T>
class BlockList {
  static_assert(std::is_trivially_copyable_v<T>, "items are zeroed and dropped as plain memory");

 public:
  size_t size() const { return size_; }

  T& operator[](size_t index) { return blocks_[index >> kShift].get()[index & kMask]; }
  const T& operator[](size_t index) const { return blocks_[index >> kShift].get()[index & kMask]; }

  void push_back(T item) {
    if (size_ >> kShift == blocks_.size()) blocks_.push_back(make_block());
    (*this)[size_++] = item;
  }
  // Blocks are kept: what is truncated is soon written again.
  void truncate(size_t size) { size_ = size; }

  void clear() {
    blocks_.clear();
    blocks_.shrink_to_fit();
    size_ = 0;
  }

 private:
  static constexpr int kShift = 16;
  static constexpr size_t kMask = (size_t{1} << kShift) - 1;

  static constexpr size_t kBytes = (kMask + 1) * sizeof(T);

  struct Unmap {
    void operator()(T* block) const { ::munmap(block, kBytes); }
  };
  using Block = std::unique_ptr<T, Unmap>;

  // From the system, which hands out zeroed pages as they are touched and takes them back at once; malloc would keep
  // blocks of this size for later.
  static Block make_block() {
    void* block = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) throw std::bad_alloc();
    return Block(static_cast<T*>(block));
  }

  std::vector<Block> blocks_;
  size_t size_ = 0;
};

}  // namespace dcp_fast::metadata
