#include "metadata/lane.h"

#include <algorithm>
#include <cstring>

#include "little_endian.h"
#include "metadata/sequences.h"

namespace dcp_fast::metadata {

namespace {

constexpr uint8_t kMemoize = 0x94;
constexpr uint8_t kTuple1 = 0x85;
constexpr uint8_t kNewObject = 0x81;
constexpr uint8_t kFrame = 0x95;
constexpr size_t kFrameBytes = 9;  // with its length
constexpr size_t kNoFrame = SIZE_MAX;

// Longer items are left to the unpickler.
constexpr size_t kMaxItem = 4096;

// Makes room for the rest of the file at once: growing step by step would touch memory twice. What is never written is
// never taken.
template <typename T>
void reserve_for_rest(std::vector<T>& column, double per_byte, uint64_t bytes_left) {
  constexpr size_t kBatch = 16384;
  if (column.capacity() - column.size() >= kBatch) return;
  const auto expected = column.size() + static_cast<size_t>(per_byte * static_cast<double>(bytes_left));
  if (expected > 2 * column.size()) column.reserve(expected + kBatch);
}

}  // namespace

bool Lane::read_batch(Value container) {
  // With gaps in the memo, what is memoized next depends on how.
  if (memo_.count() != memo_.end()) return false;
  if (container.is(Tag::kList)) return read_chunks(heap_.lists[container.payload()]);
  if (!container.is(Tag::kDict)) return false;
  Dict* dict = heap_.dict(container);
  return dict != nullptr && read_rows(dict->sequence);
}

Value Lane::outside(Value memoized) {
  const Columns& columns = heap_.columns;
  const uint64_t payload = memoized.payload();
  if (memoized.is(Tag::kRowFqn)) return Value(Tag::kText, columns.rows.fqn[payload]);
  if (memoized.is(Tag::kRowOffset)) {
    memoized = numbers_value(columns.rows.chunk_offset[payload], columns.rows.dims[payload]);
  }
  if (!memoized.is(Tag::kNumbers)) return memoized;
  // Once for each, however often it is asked for.
  Value& size = recalled_sizes_[memoized.payload()];
  if (size.is(Tag::kUnset)) {
    const size_t dims = memoized.payload() & ((1U << kDimsBits) - 1);
    const int64_t* numbers = columns.numbers.data() + (memoized.payload() >> kDimsBits);
    size = Value(Tag::kSize, new_shape(heap_, numbers, dims));
  }
  return size;
}

bool Lane::read_chunks(Sequence& list) {
  std::vector<int64_t>& numbers = heap_.columns.numbers;
  const uint64_t begin = cursor_.position();
  ChunkRun run;
  run.start = numbers.size();
  reserve_for_rest(numbers, numbers_per_byte_, cursor_.left());
  if (!read_items('e', [&] { return chunk(run); })) {
    numbers.resize(run.start);
    return false;
  }
  numbers_per_byte_ = static_cast<double>(numbers.size() - run.start) / static_cast<double>(cursor_.position() - begin);
  append_run(heap_, list, run);
  return true;
}

bool Lane::read_rows(Sequence& dict) {
  std::vector<int64_t>& numbers = heap_.columns.numbers;
  StorageRows& rows = heap_.columns.rows;
  const uint64_t begin = cursor_.position();
  const size_t first_number = numbers.size();
  const size_t first = rows.size();
  const auto reserve = [&](auto& column) { reserve_for_rest(column, rows_per_byte_, cursor_.left()); };
  reserve_for_rest(numbers, numbers_per_byte_, cursor_.left());
  rows.for_each_column(reserve);
  if (!read_items('u', [&] { return row(); })) {
    numbers.resize(first_number);
    rows.truncate(first);
    return false;
  }
  const auto bytes = static_cast<double>(cursor_.position() - begin);
  numbers_per_byte_ = static_cast<double>(numbers.size() - first_number) / bytes;
  rows_per_byte_ = static_cast<double>(rows.size() - first) / bytes;
  append_rows(heap_, dict, first, rows.size() - first);
  return true;
}

template <typename Item>
bool Lane::read_items(uint8_t end, const Item& item) {
  const uint64_t begin = cursor_.position();
  const Memo::Mark mark = memo_.begin_items();
  for (bool is_first = true;; is_first = false) {
    const Window window = cursor_.window(kMaxItem);
    at_ = window.begin;
    end_ = window.end;
    size_t frame = kNoFrame;
    const auto read_item = [&] {
      item_.width = 0;
      item_.kept_count = 0;
      number_count_ = 0;
      return item() && has_room(heap_, number_count_);
    };
    bool is_end = !is_first && opcode(end);
    if (!is_end && !read_item()) {
      frame = leave_out_frame(window);
      is_end = frame != kNoFrame && !is_first && opcode(end);
      if (frame == kNoFrame || (!is_end && !read_item())) break;
    }
    if (!is_end) {
      std::vector<int64_t>& numbers = heap_.columns.numbers;
      numbers.insert(numbers.end(), numbers_.data(), numbers_.data() + number_count_);
      memo_.put(item_);
    }
    if (frame != kNoFrame) {
      const auto taken = static_cast<size_t>(at_ - without_frame_.data());
      at_ = window.begin + taken + (taken > frame ? kFrameBytes : 0);
    }
    cursor_.advance_to(at_);
    if (is_end) return true;
  }
  memo_.take_back(mark);
  cursor_.seek(begin);
  forget_phrases();  // they may be of bytes that the file does not have any more
  return false;
}

size_t Lane::leave_out_frame(const Window& window) {
  if (ahead() <= kFrameBytes || *at_ != kFrame) return kNoFrame;
  const auto position = static_cast<size_t>(at_ - window.begin);
  const uint64_t length = from_little_endian(at_ + 1, 8);
  if (length > cursor_.left() - position - kFrameBytes) return kNoFrame;
  const size_t size = std::min(position + ahead(), 2 * kMaxItem);
  if (size <= position + kFrameBytes) return kNoFrame;
  without_frame_.resize(size - kFrameBytes);
  std::memcpy(without_frame_.data(), window.begin, position);
  std::memcpy(without_frame_.data() + position, at_ + kFrameBytes, size - position - kFrameBytes);
  at_ = without_frame_.data();
  end_ = at_ + without_frame_.size();
  return position;
}

void Lane::forget_phrases() {
  for (Phrase* phrase :
       {&chunk_begins_, &sizes_begin_, &key_begins_, &index_, &key_offset_, &value_begins_, &offset_, &length_}) {
    *phrase = {};
  }
}

bool Lane::chunk(ChunkRun& run) {
  const size_t start = heap_.columns.numbers.size();
  size_t dims = 0;
  size_t dims_of_sizes = 0;
  const auto keep_size = [&](size_t position) {
    keep_last(numbers_value(position, dims), numbers_value(2 * dims, 0).payload());
  };
  if (!phrase(chunk_begins_,
              [&] { return begin_object(Global::kChunkStorageMetadata, Known::kOffsets) && size_type(); })) {
    return false;
  }
  if (!shape(dims)) return false;
  keep_size(start);
  if (!phrase(sizes_begin_, [&] { return field(Known::kSizes) && size_type(); })) return false;
  if (!shape(dims_of_sizes) || dims_of_sizes != dims) return false;
  keep_size(start + dims);
  if (!end_object() || (run.count > 0 && run.dims != dims)) return false;
  run.dims = static_cast<uint32_t>(dims);
  ++run.count;
  run.sound = run.sound && is_sound(numbers_.data(), numbers_.data() + dims, dims);
  return true;
}

bool Lane::row() {
  StorageRows& rows = heap_.columns.rows;
  const size_t row = rows.size();
  uint32_t fqn = 0;
  uint32_t file = 0;
  bool is_new = false;
  int64_t hint = StorageRows::kNoIndex;
  size_t dims = StorageRows::kNoOffset;
  int64_t offset = 0;
  int64_t length = 0;

  if (!phrase(key_begins_, [&] { return begin_object(Global::kMetadataIndex, Known::kFqn); })) return false;
  if (!text(fqn, is_new)) return false;
  if (is_new) keep_last(Value(Tag::kRowFqn, row), 1);
  if (!phrase(index_, [&] { return field(Known::kIndex); })) return false;
  if (!opcode('N') && (!integer(hint) || hint == StorageRows::kNoIndex)) return false;
  if (ahead() > 0 && *at_ != 'u') {
    if (!phrase(key_offset_, [&] { return field(Known::kOffset) && size_type(); }) || !shape(dims)) return false;
    keep_last(Value(Tag::kRowOffset, row), 1);
  }
  if (!phrase(value_begins_,
              [&] { return end_object() && begin_object(Global::kStorageInfo, Known::kRelativePath); })) {
    return false;
  }
  if (!text(file, is_new)) return false;
  if (is_new) keep_last(Value(Tag::kText, file), 0);
  if (!phrase(offset_, [&] { return field(Known::kOffset); }) || !integer(offset)) return false;
  if (!phrase(length_, [&] { return field(Known::kLength); }) || !integer(length) || !end_object()) return false;

  if (row + 1 >= HashTable::kNone) return false;
  rows.fqn.push_back(fqn);
  rows.dims.push_back(static_cast<uint32_t>(dims));
  rows.chunk_offset.push_back(dims == StorageRows::kNoOffset ? 0 : heap_.columns.numbers.size());
  rows.index.push_back(hint);
  rows.file.push_back(file);
  rows.offset.push_back(offset);
  rows.length.push_back(length);
  if (!rows.transforms.empty()) rows.transforms.push_back(0);
  return true;
}

template <typename Match>
bool Lane::phrase(Phrase& known, const Match& match) {
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

bool Lane::begin_object(Global type, Known first_field) {
  return recalls(Value(Tag::kGlobal, static_cast<uint64_t>(type))) && opcode(')') && opcode(kNewObject) && put() &&
         opcode('}') && put() && opcode('(') && field(first_field);
}

// The call of torch.Size without its type.
bool Lane::shape(size_t& dims) {
  const size_t start = number_count_;
  const bool is_marked = opcode('(');
  const bool is_empty = !is_marked && opcode(')');
  while (!is_empty && number_count_ - start < kMaxDims && integer(numbers_[number_count_])) ++number_count_;
  dims = number_count_ - start;
  if (!is_empty) {
    if (!is_marked && (dims < 1 || dims > 3)) return false;
    const auto code = static_cast<uint8_t>(is_marked ? 't' : kTuple1 + dims - 1);
    const uint8_t usual[] = {code, kMemoize, kTuple1, kMemoize, 'R', kMemoize};
    if (ahead() >= sizeof usual && std::memcmp(at_, usual, sizeof usual) == 0) {
      at_ += sizeof usual;
      item_.width += 3;
      return true;
    }
    if (!opcode(code) || !put()) return false;
  }
  return opcode(kTuple1) && put() && opcode('R') && put();
}

bool Lane::text(uint32_t& index, bool& is_new) {
  if (ahead() < 5) return false;
  size_t length = 0;
  size_t prefix = 0;
  is_new = true;
  if (*at_ == 0x8c) {  // SHORT_BINUNICODE
    length = at_[1];
    prefix = 2;
  } else if (*at_ == 'X') {  // BINUNICODE
    length = from_little_endian(at_ + 1, 4);
    prefix = 5;
  } else {
    is_new = false;
    Value value;
    if (!recall(value)) return false;
    if (value.is(Tag::kRowFqn)) value = Value(Tag::kText, heap_.columns.rows.fqn[value.payload()]);
    index = static_cast<uint32_t>(value.payload());
    return value.is(Tag::kText);
  }
  if (length > ahead() - prefix || length > kMaxText) return false;
  index = heap_.intern({reinterpret_cast<const char*>(at_ + prefix), length});
  at_ += prefix + length;
  return index != TextTable::kNone && put();
}

bool Lane::integer(int64_t& number) {
  constexpr size_t kLongest = 10;
  if (ahead() < kLongest) return false;
  switch (*at_) {
    case 'K':  // BININT1
      number = at_[1];
      at_ += 2;
      return true;
    case 'M':  // BININT2
      number = static_cast<int64_t>(from_little_endian(at_ + 1, 2));
      at_ += 3;
      return true;
    case 'J':  // BININT
      number = static_cast<int32_t>(from_little_endian(at_ + 1, 4));
      at_ += 5;
      return true;
    case 0x8a: {  // LONG1
      const size_t width = at_[1];
      if (width > 8) return false;
      uint64_t value = from_little_endian(at_ + 2, width);
      if (width > 0 && width < 8 && (at_[1 + width] & 0x80) != 0) value |= ~uint64_t{0} << (8 * width);
      number = static_cast<int64_t>(value);
      at_ += 2 + width;
      return true;
    }
    default:
      return false;
  }
}

bool Lane::opcode(uint8_t code) {
  if (at_ == end_ || *at_ != code) return false;
  ++at_;
  return true;
}

bool Lane::put() {
  if (ahead() < 5) return false;
  const uint64_t next = memo_.end() + item_.width++;
  if (*at_ == kMemoize) {
    ++at_;
    return true;
  }
  by_index_ = true;
  uint64_t index = at_[1];
  if (*at_ == 'r') {  // LONG_BINPUT
    index = from_little_endian(at_ + 1, 4);
    at_ += 5;
    return index == next;
  }
  if (*at_ != 'q') return false;  // BINPUT
  at_ += 2;
  return index == next;
}

bool Lane::recall(Value& value) {
  if (ahead() < 5) return false;
  uint64_t index = at_[1];
  if (*at_ == 'j') {  // LONG_BINGET
    index = from_little_endian(at_ + 1, 4);
    at_ += 5;
  } else if (*at_ == 'h') {  // BINGET
    at_ += 2;
  } else {
    return false;
  }
  if (index >= memo_.end()) return false;
  value = memo_.get(index);
  return true;
}

bool Lane::recalls(Value expected) {
  Value value;
  return recall(value) && value == expected;
}

}  // namespace dcp_fast::metadata
