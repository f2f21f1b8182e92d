// Handles that programs hold. A number is never used twice, so that a handle that was destroyed stays invalid.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "driver/driver_error.h"

namespace simcuda {

template <typename Handle, typename Object>
class HandleTable {
 public:
  Handle add(std::shared_ptr<Object> object) {
    // Not small: some small numbers are handles with a meaning of their own.
    next_ += 0x10;
    objects_.emplace(next_, std::move(object));
    return reinterpret_cast<Handle>(next_);
  }

  // Throws CUDA_ERROR_INVALID_HANDLE for a handle that is not, or no longer, valid.
  const std::shared_ptr<Object>& get(Handle handle) const {
    const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
    if (found == objects_.end()) throw DriverError{CUDA_ERROR_INVALID_HANDLE};
    return found->second;
  }

  std::shared_ptr<Object> take(Handle handle) {
    std::shared_ptr<Object> object = get(handle);
    objects_.erase(reinterpret_cast<uintptr_t>(handle));
    return object;
  }

  // Removes all for which the predicate holds, and returns how many these were.
  template <typename Predicate>
  size_t remove_if(Predicate&& predicate) {
    size_t removed = 0;
    for (auto entry = objects_.begin(); entry != objects_.end();) {
      if (predicate(*entry->second)) {
        entry = objects_.erase(entry);
        ++removed;
      } else {
        ++entry;
      }
    }
    return removed;
  }

  size_t size() const { return objects_.size(); }

 private:
  uintptr_t next_ = 0x51c000000;
  std::map<uintptr_t, std::shared_ptr<Object>> objects_;
};

}  // namespace simcuda
