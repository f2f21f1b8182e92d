// A value on the stack or in the memo of the metadata unpickler: 8 bytes, as there are some seventeen for each chunk of
// a checkpoint. What does not fit lies in the heap (heap.h), and the value says where.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcp_fast::metadata {

enum class Tag : uint8_t {
  kUnset,  // no value: a memo entry that was never written, a field that was never set
  kNone,
  kFalse,
  kTrue,
  kInt,           // the number itself
  kBigInt,        // a number of up to 64 bits that does not fit here: index into Heap::ints
  kLiteral,       // a float, bytes or longer number: position of its opcode in Heap::literals
  kText,          // index into Heap::texts
  kGlobal,        // Global
  kDType,         // code of a dtype, see names.h
  kLayout,        // code of a layout, see names.h
  kMemoryFormat,  // MemoryFormat
  kInts,          // a tuple of numbers: index into Heap::ints, where the count stands before the items
  kIntsInTuple,   // a tuple whose only item is such a tuple, the arguments of torch.Size: the same index
  kSize,          // torch.Size: likewise
  kNumbers,       // only in the memo: a torch.Size whose numbers are columns already, see heap.h
  kRowOffset,     // only in the memo: the offset of a storage row
  kRowFqn,        // only in the memo: the FQN of a storage row
  kTuple,         // any other tuple: index into Heap::values, where the count stands before the items
  kList,          // index into Heap::lists
  kDict,          // place and generation of a dict, see heap.h
  kPath,          // a pathlib path: index into Heap::paths
  kChunk,         // ChunkStorageMetadata: index into Heap::chunks, and so on
  kChunks,        // in a list, several of them that are columns already: index into Heap::chunk_runs
  kRows,  // in a dict, the key of a pair that stands for several storage rows: the first; its value is their count
  kTensor,
  kBytesEntry,
  kProperties,
  kIndex,
  kStorageInfo,
  kStorageMeta,
  kMetadata,
  kInert,  // a value of an inert type, which nothing here makes: only what is left out may hold one
};

class Value {
 public:
  static constexpr int kTagBits = 6;
  static constexpr int kPayloadBits = 64 - kTagBits;

  Value() = default;
  explicit Value(Tag tag, uint64_t payload = 0) : bits_(payload << kTagBits | static_cast<uint64_t>(tag)) {}

  static bool fits(int64_t number) {
    constexpr int64_t kBound = int64_t{1} << (kPayloadBits - 1);
    return number >= -kBound && number < kBound;
  }
  static Value of(int64_t number) { return Value(Tag::kInt, static_cast<uint64_t>(number)); }
  static Value of(bool flag) { return Value(flag ? Tag::kTrue : Tag::kFalse); }

  Tag tag() const { return static_cast<Tag>(bits_ & ((1U << kTagBits) - 1)); }
  bool is(Tag other) const { return tag() == other; }
  uint64_t payload() const { return bits_ >> kTagBits; }
  int64_t number() const { return static_cast<int64_t>(bits_) >> kTagBits; }
  bool operator==(const Value& other) const { return bits_ == other.bits_; }

 private:
  uint64_t bits_ = 0;
};

}  // namespace dcp_fast::metadata
