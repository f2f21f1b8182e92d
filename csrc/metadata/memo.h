// The unpickler's memo. A pickler memoizes nearly every object that it writes, but DCP's metadata asks only for a few
// of them again; those that it never does are counted and not kept, which saves half of all memory. Of items that are
// alike and follow each other, such as chunks, the memo keeps the first and how the others differ from it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "metadata/block_list.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

enum class Keep { kYes, kNo };

// What an item puts into the memo: `width` values, of which those in `kept` may be asked for again.
struct MemoItem {
  struct Kept {
    uint64_t place = 0;  // among the values of the item
    Value value;
    uint64_t step = 0;  // what the payload grows by from each item to the next
  };
  uint64_t width = 0;
  size_t kept_count = 0;
  std::array<Kept, 3> kept;

  void keep(uint64_t place, Value value, uint64_t step) { kept[kept_count++] = {place, value, step}; }
};

class Memo {
 public:
  // Indices come in order, with or without gaps: false if not.
  bool put(uint64_t index, Value value, Keep keep) {
    if (index < end_) return false;
    end_ = index + 1;
    ++count_;
    if (words_.empty() || words_.back().number != index / 64) words_.push_back({index / 64, 0, 0, kept_.size()});
    Word& word = words_.back();
    const uint64_t bit = uint64_t{1} << index % 64;
    word.put |= bit;
    if (keep == Keep::kNo) return true;
    word.kept |= bit;
    kept_.push_back(value);
    return true;
  }

  // Puts the values of an item at the next indices.
  void put(const MemoItem& item) {
    if (!run_is_open_ || !runs_.back().continues_with(item)) runs_.push_back({end_, 0, item});
    run_is_open_ = true;
    ++runs_.back().items;
    end_ += item.width;
    count_ += item.width;
  }

  // Tag::kUnset for what is not there.
  Value get(uint64_t index) {
    Recent& recent = recent_[index % recent_.size()];
    if (recent.index_plus_one != index + 1) recent = {index + 1, find(index)};
    return recent.value;
  }

  // Whether the index was written, kept or not.
  bool was_put(uint64_t index) const {
    if (run_of(index) != nullptr) return true;
    const Word* word = word_of(index);
    return word != nullptr && (word->put >> index % 64 & 1) != 0;
  }

  uint64_t count() const { return count_; }
  uint64_t end() const { return end_; }

  // Items can be taken back to where they began.
  struct Mark {
    size_t runs;
    uint64_t end;
    uint64_t count;
  };
  Mark begin_items() {
    run_is_open_ = false;
    return {runs_.size(), end_, count_};
  }
  void take_back(const Mark& mark) {
    if (runs_.size() == mark.runs) return;
    runs_.resize(mark.runs);
    run_is_open_ = false;
    end_ = mark.end;
    count_ = mark.count;
    recent_.fill({});
  }

 private:
  struct Word {
    uint64_t number;
    uint64_t put;
    uint64_t kept;
    size_t first;  // where in kept_ the first of this word is
  };
  struct Run {
    uint64_t first;
    uint64_t items;
    MemoItem item;

    bool continues_with(const MemoItem& next) const {
      if (next.width != item.width || next.kept_count != item.kept_count) return false;
      for (size_t i = 0; i < item.kept_count; ++i) {
        if (next.kept[i].place != item.kept[i].place || !(next.kept[i].value == value(i, items))) return false;
      }
      return true;
    }
    Value value(size_t i, uint64_t number) const {
      const MemoItem::Kept& kept = item.kept[i];
      return Value(kept.value.tag(), kept.value.payload() + number * kept.step);
    }
  };

  const Run* run_of(uint64_t index) const {
    const auto after = std::upper_bound(runs_.begin(), runs_.end(), index,
                                        [](uint64_t value, const Run& run) { return value < run.first; });
    if (after == runs_.begin()) return nullptr;
    const Run& run = *(after - 1);
    return index - run.first < run.items * run.item.width ? &run : nullptr;
  }
  const Word* word_of(uint64_t index) const {
    const auto word = std::lower_bound(words_.begin(), words_.end(), index / 64,
                                       [](const Word& left, uint64_t number) { return left.number < number; });
    return word != words_.end() && word->number == index / 64 ? &*word : nullptr;
  }
  Value find(uint64_t index) const {
    if (const Run* run = run_of(index)) {
      const uint64_t place = (index - run->first) % run->item.width;
      for (size_t i = 0; i < run->item.kept_count; ++i) {
        if (run->item.kept[i].place == place) return run->value(i, (index - run->first) / run->item.width);
      }
      return {};
    }
    const Word* word = word_of(index);
    const uint64_t bit = uint64_t{1} << index % 64;
    if (word == nullptr || (word->kept & bit) == 0) return {};
    return kept_[word->first + static_cast<size_t>(__builtin_popcountll(word->kept & (bit - 1)))];
  }

  // Nearly all that is asked for are the same few types and names of fields.
  struct Recent {
    uint64_t index_plus_one;
    Value value;
  };
  std::array<Recent, 256> recent_{};
  std::vector<Word> words_;
  BlockList<Value> kept_;
  std::vector<Run> runs_;
  bool run_is_open_ = false;  // whether the last one may go on
  uint64_t end_ = 0;
  uint64_t count_ = 0;
};

}  // namespace dcp_fast::metadata
