// Reads batches of chunks and of storage rows straight into columns. They are nearly all of a large file, and pickle
// writes each of them in the same way: up to 1000 items of a list between MARK and APPENDS, or of a dict between MARK
// and SETITEMS. A batch that has anything else is left to the unpickler, as if it had not been begun. What is read here
// the unpickler would read in the same way, only slower.
//
// A chunk of a list, as Python writes it after the first, with what the numbers in the memo stand for:
//
//   68 1e           BINGET 30      ChunkStorageMetadata    a phrase: the same bytes in each chunk
//   29 81           EMPTY_TUPLE, NEWOBJ
//   94              MEMOIZE        the chunk
//   7d 94 28        EMPTY_DICT, MEMOIZE, MARK
//   68 21           BINGET 33      "offsets"
//   68 18           BINGET 24      torch.Size
//   4b 04 4b 00     BININT1 4, BININT1 0                   two numbers: item_reader.h's shape()
//   86 94 85 94     TUPLE2, MEMOIZE, TUPLE1, MEMOIZE
//   52 94           REDUCE, MEMOIZE the offsets, torch.Size([4, 0])
//   68 25 68 18     BINGET 37      "sizes", torch.Size     another phrase
//   4b 04 4d 00 04  BININT1 4, BININT2 1024                the numbers of the sizes
//   86 94 85 94 52 94
//   75 62           SETITEMS, BUILD
//
// Of its eight memoized values the memo keeps two, the offsets and the sizes, which other objects may share. A row of
// storage_data is likewise a MetadataIndex and a _StorageInfo one after the other.
//
// Every 64 KiB pickle begins a frame: nine bytes, 95 and a length, before any opcode. An item that they interrupt is
// read from a copy without them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "metadata/cursor.h"
#include "metadata/heap.h"
#include "metadata/item_reader.h"
#include "metadata/memo.h"
#include "metadata/value.h"

namespace dcp_fast::metadata {

class BatchReader {
 public:
  BatchReader(Heap& heap, Memo& memo, Cursor& cursor) : heap_(heap), memo_(memo), cursor_(cursor), item_(heap, memo) {}

  // After a MARK above `container`. True: everything up to and including the APPENDS or SETITEMS has been read.
  bool read(Value container);

  // Turns what the memo keeps, of a batch or of anything else, into a value that the unpickler knows.
  Value as_value(Value memoized);

 private:
  bool read_chunks(Sequence& list);
  bool read_rows(Sequence& dict);
  // Items up to the opcode `end`, which is taken too.
  template <typename ReadItem>
  bool read_items(uint8_t end, const ReadItem& read_item);
  bool chunk(ChunkRun& run);
  bool row();
  // If a frame begins where the item stopped, the item begins anew in a copy that has it not. Returns where in the
  // window the frame is.
  size_t leave_out_frame(const Window& window);
  void forget_phrases();

  Heap& heap_;
  Memo& memo_;
  Cursor& cursor_;
  ItemReader item_;
  std::vector<uint8_t> without_frame_;
  std::unordered_map<uint64_t, Value> recalled_sizes_;  // those of batches that were asked for

  // Of the last batch: the rest of the file will be like it.
  double numbers_per_byte_ = 0;
  double rows_per_byte_ = 0;

  // Of a chunk:
  Phrase chunk_begins_;
  Phrase sizes_begin_;
  // Of a row:
  Phrase key_begins_;
  Phrase index_;
  Phrase key_offset_;
  Phrase value_begins_;
  Phrase offset_;
  Phrase length_;
};

}  // namespace dcp_fast::metadata
