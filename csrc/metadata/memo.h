// The unpickler's memo. A pickler memoizes nearly every object that it writes, but DCP's metadata asks only for a few
// of them again; those that it never does are counted and not kept, which saves half of all memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "metadata/block_list.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

enum class Keep { kYes, kNo };

class Memo {
 public:
  // Indices come in order, with or without gaps: false if not.
  bool put(uint64_t index, Value value, Keep keep) {
    if (index < end_) return false;
    end_ = index + 1;
    ++count_;
    const size_t word = index / 64;
    if (word >= words_.size()) words_.resize(word + 1, Word{0, 0, kept_.size()});
    const uint64_t bit = uint64_t{1} << index % 64;
    words_[word].put |= bit;
    if (keep == Keep::kNo) return true;
    words_[word].kept |= bit;
    kept_.push_back(value);
    return true;
  }

  // Tag::kUnset for what is not there.
  Value get(uint64_t index) {
    Recent& recent = recent_[index % recent_.size()];
    if (recent.index_plus_one != index + 1) recent = {index + 1, find(index)};
    return recent.value;
  }

  // Whether the index was written, kept or not.
  bool was_put(uint64_t index) const {
    return index / 64 < words_.size() && (words_[index / 64].put >> index % 64 & 1) != 0;
  }

  uint64_t count() const { return count_; }

 private:
  struct Word {
    uint64_t put;
    uint64_t kept;
    size_t first;  // where in kept_ the first of this word is
  };
  Value find(uint64_t index) const {
    const size_t word = index / 64;
    const uint64_t bit = uint64_t{1} << index % 64;
    if (word >= words_.size() || (words_[word].kept & bit) == 0) return {};
    return kept_[words_[word].first + static_cast<size_t>(__builtin_popcountll(words_[word].kept & (bit - 1)))];
  }

  // Nearly all that is asked for are the same few types and names of fields.
  struct Recent {
    uint64_t index_plus_one;
    Value value;
  };
  std::array<Recent, 256> recent_{};
  std::vector<Word> words_;
  BlockList<Value> kept_;
  uint64_t end_ = 0;
  uint64_t count_ = 0;
};

}  // namespace dcp_fast::metadata
