// Keeps the last few pickles of tensors and what was parsed from them. Records that lie next to each other, such as the
// experts of a layer or the moments of an optimizer, often have the same pickle byte for byte. It is then neither
// checked nor parsed again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "checkpoint/bytes.h"
#include "checkpoint/tensor_pickle.h"

namespace dcp_fast::checkpoint {

class PickleCache {
 public:
  // Returns the tensor of a pickle of the same bytes and checksum, or nullptr if there is none. It is valid until the
  // next call of keep().
  const PickledTensor* find(const Bytes& pickle, uint32_t crc32) const {
    const std::string_view bytes = view(pickle);
    if (bytes.empty()) return nullptr;
    for (const Known& known : known_) {
      if (known.crc32 == crc32 && known.pickle == bytes) return &known.tensor;
    }
    return nullptr;
  }

  // Replaces the oldest pickle. The checksum must be right, or 0 if the archive has none.
  const PickledTensor* keep(const Bytes& pickle, uint32_t crc32, PickledTensor tensor) {
    Known& known = known_[next_++ % known_.size()];
    known.crc32 = crc32;
    known.pickle = view(pickle);
    known.tensor = std::move(tensor);
    return &known.tensor;
  }

 private:
  struct Known {
    uint32_t crc32 = 0;
    std::string pickle;  // empty if there is none
    PickledTensor tensor;
  };

  static std::string_view view(const Bytes& pickle) {
    return {reinterpret_cast<const char*>(pickle.data()), pickle.size()};
  }

  std::array<Known, 4> known_;
  size_t next_ = 0;
};

}  // namespace dcp_fast::checkpoint
