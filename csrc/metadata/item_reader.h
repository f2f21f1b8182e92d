// Reads the opcodes of one item of a batch: a chunk, or a storage row. It knows the few opcodes that pickle writes for
// them, and notes what they put into the memo.
//
// All that reads is false at the first opcode that does not belong there. The reader then stands before this opcode, so
// that its caller can look whether it begins a frame.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "metadata/collect.h"
#include "metadata/heap.h"
#include "metadata/memo.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

// Opcodes that are the same in every item, but for what they memoize. They have one meaning wherever they stand, since
// an index of the memo is written only once: where the same bytes come again they need not be looked at one by one.
struct Phrase {
  static constexpr size_t kMaxSize = 32;
  uint64_t bytes[kMaxSize / 8] = {};
  uint64_t mask[kMaxSize / 8] = {};
  size_t size = 0;  // 0: not seen yet
  uint64_t puts = 0;
};

class ItemReader {
 public:
  ItemReader(Heap& heap, Memo& memo) : heap_(heap), memo_(memo) {}

  // Where the bytes of the item are.
  void look_at(const uint8_t* begin, const uint8_t* end) {
    at_ = begin;
    end_ = end;
  }
  const uint8_t* at() const { return at_; }
  size_t ahead() const { return static_cast<size_t>(end_ - at_); }

  // Forgets the item before.
  void begin_item() {
    item_.width = 0;
    item_.kept_count = 0;
    number_count_ = 0;
  }
  // What the item has memoized, and the numbers of its shapes.
  const MemoItem& memoized() const { return item_; }
  const int64_t* numbers() const { return numbers_.data(); }
  size_t number_count() const { return number_count_; }

  // What `match` reads, or the same bytes as the last time.
  template <typename Match>
  bool phrase(Phrase& known, const Match& match);

  bool begin_object(Global type, Known first_field);
  bool end_object() { return opcode('u') && opcode('b'); }
  bool field(Known name) { return recalls(Value(Tag::kText, static_cast<uint64_t>(name))); }
  bool size_type() { return recalls(Value(Tag::kGlobal, static_cast<uint64_t>(Global::kSize))); }
  bool shape(size_t& dims);
  // Fields of a later torch that hold a number, a flag or None, before the end of an object. They are left out.
  bool later_fields(Global type);
  bool text(uint32_t& index, bool& is_new);
  bool integer(int64_t& number);
  bool opcode(uint8_t code);
  bool stands_at(uint8_t code) const { return at_ != end_ && *at_ == code; }
  // Of what was memoized last, the memo shall keep this value.
  void keep_last(Value value, uint64_t step) { item_.keep(item_.width - 1, value, step); }

 private:
  bool put();
  bool recall(Value& value);
  bool recalls(Value expected);

  Heap& heap_;
  Memo& memo_;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  MemoItem item_;
  std::array<int64_t, 2 * kMaxDims> numbers_{};
  size_t number_count_ = 0;
  bool by_index_ = false;  // whether a phrase memoizes with an index of its own
};

template <typename Match>
bool ItemReader::phrase(Phrase& known, const Match& match) {
  constexpr size_t kWords = Phrase::kMaxSize / sizeof(uint64_t);
  uint64_t words[kWords] = {};
  if (ahead() >= Phrase::kMaxSize) {
    std::memcpy(words, at_, Phrase::kMaxSize);
    uint64_t difference = 0;
    for (size_t i = 0; i < kWords; ++i) difference |= (words[i] ^ known.bytes[i]) & known.mask[i];
    if (difference == 0 && known.size > 0) {
      at_ += known.size;
      item_.width += known.puts;
      return true;
    }
  }
  const uint8_t* begin = at_;
  const size_t room = ahead();
  const uint64_t width = item_.width;
  by_index_ = false;
  if (!match()) return false;
  const auto size = static_cast<size_t>(at_ - begin);
  if (by_index_ || room < Phrase::kMaxSize || size > Phrase::kMaxSize) return true;
  known.size = size;
  known.puts = item_.width - width;
  std::memcpy(known.bytes, words, sizeof words);
  std::memset(known.mask, 0, sizeof known.mask);
  std::memset(known.mask, 0xff, size);
  return true;
}

}  // namespace dcp_fast::metadata
