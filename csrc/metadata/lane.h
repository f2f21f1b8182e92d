// The fast lane of the unpickler: reads a whole batch of chunks or of storage rows, as pickle writes them for lists and
// dicts, straight into columns. It knows only the opcodes that the writer uses for them, and at the first other one all
// is as if it had not begun. What it reads, the unpickler would read in the same way, only slower.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "metadata/collect.h"
#include "metadata/cursor.h"
#include "metadata/heap.h"
#include "metadata/memo.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

class Lane {
 public:
  Lane(Heap& heap, Memo& memo, Cursor& cursor) : heap_(heap), memo_(memo), cursor_(cursor) {}

  // After a MARK above `container`. True: everything up to and including the APPENDS or SETITEMS has been read.
  bool read_batch(Value container);

  // What the memo has of such a batch, and of anything else, as a value that the unpickler knows.
  Value outside(Value memoized);

 private:
  // Opcodes that are the same in every item but for what they memoize. They have one meaning wherever they stand: an
  // index of the memo is written only once.
  struct Phrase {
    static constexpr size_t kMaxSize = 32;
    uint64_t bytes[kMaxSize / 8] = {};
    uint64_t mask[kMaxSize / 8] = {};
    size_t size = 0;  // 0: not seen yet
    uint64_t puts = 0;
  };

  bool read_chunks(Sequence& list);
  bool read_rows(Sequence& dict);
  template <typename Item>
  bool read_items(uint8_t end, const Item& item);
  bool chunk(ChunkRun& run);
  bool row();
  // Where the item stopped: if a frame begins there, its item begins anew in a copy that has it not. pickle begins a
  // frame every 64 KiB, wherever in an item that is. Returns where in the window the frame is.
  size_t leave_out_frame(const Window& window);
  void forget_phrases();

  // Parts of items. All are false at the first opcode that does not belong there; if it begins a frame, that is where
  // they are then.
  template <typename Match>
  bool phrase(Phrase& known, const Match& match);
  bool begin_object(Global type, Known first_field);
  bool end_object() { return opcode('u') && opcode('b'); }
  bool field(Known name) { return recalls(Value(Tag::kText, static_cast<uint64_t>(name))); }
  bool size_type() { return recalls(Value(Tag::kGlobal, static_cast<uint64_t>(Global::kSize))); }
  bool shape(size_t& dims);
  bool text(uint32_t& index, bool& is_new);
  bool integer(int64_t& number);
  bool opcode(uint8_t code);
  bool put();
  bool recall(Value& value);
  bool recalls(Value expected);
  void keep_last(Value value, uint64_t step) { item_.keep(item_.width - 1, value, step); }

  size_t ahead() const { return static_cast<size_t>(end_ - at_); }

  Heap& heap_;
  Memo& memo_;
  Cursor& cursor_;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  // What the item has memoized, and the numbers of its shapes.
  MemoItem item_;
  std::array<int64_t, 2 * kMaxDims> numbers_{};
  size_t number_count_ = 0;
  bool by_index_ = false;  // whether a phrase memoizes with an index of its own

  std::vector<uint8_t> without_frame_;
  std::unordered_map<uint64_t, Value> recalled_sizes_;  // those of batches that were asked for

  // How many of them the last batch had: the rest of the file will be like it.
  double numbers_per_byte_ = 0;
  double rows_per_byte_ = 0;

  Phrase chunk_begins_;
  Phrase sizes_begin_;
  Phrase key_begins_;
  Phrase index_;
  Phrase key_offset_;
  Phrase value_begins_;
  Phrase offset_;
  Phrase length_;
};

}  // namespace dcp_fast::metadata
