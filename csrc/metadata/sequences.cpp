#include "metadata/sequences.h"

#include <algorithm>

#include "metadata/failure.h"

namespace dcp_fast::metadata {

namespace {

constexpr uint64_t kSegmentHeader = 2;
constexpr int kGenerationBits = Value::kPayloadBits - 32;

Value dict_value(const Heap& heap, size_t place) {
  return Value(Tag::kDict, uint64_t{heap.dicts[place].generation} << 32 | place);
}

size_t begin_shape(Heap& heap, size_t count) {
  const size_t index = heap.ints.size();
  // A shape is referred to by 32 bits.
  if (index >= kUnset) unsupported("more numbers than 32 bits count");
  heap.ints.push_back(static_cast<int64_t>(count));
  return index;
}

}  // namespace

Value new_tuple(Heap& heap, const Value* items, size_t count) {
  if (count == 0) return Value(Tag::kInts, 0);
  if (count == 1 && items[0].is(Tag::kInts)) return Value(Tag::kIntsInTuple, items[0].payload());
  if (std::all_of(items, items + count, Heap::is_int)) {
    const size_t index = begin_shape(heap, count);
    for (size_t i = 0; i < count; ++i) heap.ints.push_back(heap.number(items[i]));
    return Value(Tag::kInts, index);
  }
  const size_t index = heap.values.size();
  heap.values.push_back(Value::of(static_cast<int64_t>(count)));
  for (size_t i = 0; i < count; ++i) heap.values.push_back(items[i]);
  return Value(Tag::kTuple, index);
}

size_t new_shape(Heap& heap, const int64_t* numbers, size_t count) {
  const size_t index = begin_shape(heap, count);
  for (size_t i = 0; i < count; ++i) heap.ints.push_back(numbers[i]);
  return index;
}

Value new_list(Heap& heap) {
  if (heap.lists.size() >= kUnset) unsupported("more lists than 32 bits count");
  heap.lists.push_back({});
  return Value(Tag::kList, heap.lists.size() - 1);
}

Value new_dict(Heap& heap) {
  if (!heap.free_dicts.empty()) {
    const size_t place = heap.free_dicts.back();
    heap.free_dicts.pop_back();
    return dict_value(heap, place);
  }
  if (heap.dicts.size() >= kUnset) unsupported("more dicts than 32 bits count");
  heap.dicts.emplace_back();
  return dict_value(heap, heap.dicts.size() - 1);
}

void append(Heap& heap, Sequence& sequence, const Value* items, size_t count) {
  if (count == 0) return;
  const uint64_t segment = heap.values.size();
  if (sequence.items == 0) {
    sequence.first = segment;
  } else {
    heap.values[sequence.last] = Value::of(static_cast<int64_t>(segment));
  }
  heap.values.push_back(Value::of(int64_t{0}));
  heap.values.push_back(Value::of(static_cast<int64_t>(count)));
  for (size_t i = 0; i < count; ++i) heap.values.push_back(items[i]);
  sequence.last = segment;
  sequence.items += count;
  sequence.cells += kSegmentHeader + count;
}

void free_dict(Heap& heap, Value value) {
  const auto place = static_cast<uint32_t>(value.payload());
  Dict& dict = heap.dicts[place];
  const Sequence& sequence = dict.sequence;
  if (sequence.items > 0 && heap.values.size() - sequence.first == sequence.cells) {
    heap.values.truncate(sequence.first);
  }
  dict.sequence = {};
  ++dict.generation;
  if (dict.generation >> kGenerationBits == 0) heap.free_dicts.push_back(place);
}

}  // namespace dcp_fast::metadata
