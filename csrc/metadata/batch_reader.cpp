#include "metadata/batch_reader.h"

#include <algorithm>
#include <cstring>

#include "little_endian.h"
#include "metadata/sequences.h"

namespace dcp_fast::metadata {

namespace {

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

bool BatchReader::read(Value container) {
  // With gaps in the memo, what is memoized next depends on how.
  if (memo_.count() != memo_.end()) return false;
  if (container.is(Tag::kList)) return read_chunks(heap_.lists[container.payload()]);
  if (!container.is(Tag::kDict)) return false;
  Dict* dict = heap_.dict(container);
  return dict != nullptr && read_rows(dict->sequence);
}

Value BatchReader::as_value(Value memoized) {
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

bool BatchReader::read_chunks(Sequence& list) {
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

bool BatchReader::read_rows(Sequence& dict) {
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

template <typename ReadItem>
bool BatchReader::read_items(uint8_t end, const ReadItem& read_item) {
  const uint64_t begin = cursor_.position();
  const Memo::Mark mark = memo_.begin_items();
  const auto is_read = [&] {
    item_.begin_item();
    return read_item() && has_room(heap_, item_.number_count());
  };
  for (bool is_first = true;; is_first = false) {
    const Window window = cursor_.window(kMaxItem);
    item_.look_at(window.begin, window.end);
    size_t frame = kNoFrame;
    bool is_end = !is_first && item_.opcode(end);
    if (!is_end && !is_read()) {
      frame = leave_out_frame(window);
      is_end = frame != kNoFrame && !is_first && item_.opcode(end);
      if (frame == kNoFrame || (!is_end && !is_read())) break;
    }
    if (!is_end) {
      std::vector<int64_t>& numbers = heap_.columns.numbers;
      numbers.insert(numbers.end(), item_.numbers(), item_.numbers() + item_.number_count());
      memo_.put(item_.memoized());
    }
    const uint8_t* at = item_.at();
    if (frame != kNoFrame) {
      const auto taken = static_cast<size_t>(at - without_frame_.data());
      at = window.begin + taken + (taken > frame ? kFrameBytes : 0);
    }
    cursor_.advance_to(at);
    if (is_end) return true;
  }
  memo_.take_back(mark);
  cursor_.seek(begin);
  forget_phrases();  // they may be of bytes that the file does not have any more
  return false;
}

size_t BatchReader::leave_out_frame(const Window& window) {
  if (item_.ahead() <= kFrameBytes || !item_.stands_at(kFrame)) return kNoFrame;
  const auto position = static_cast<size_t>(item_.at() - window.begin);
  const uint64_t length = from_little_endian(item_.at() + 1, 8);
  if (length > cursor_.left() - position - kFrameBytes) return kNoFrame;
  const size_t size = std::min(position + item_.ahead(), 2 * kMaxItem);
  if (size <= position + kFrameBytes) return kNoFrame;
  without_frame_.resize(size - kFrameBytes);
  std::memcpy(without_frame_.data(), window.begin, position);
  std::memcpy(without_frame_.data() + position, item_.at() + kFrameBytes, size - position - kFrameBytes);
  item_.look_at(without_frame_.data(), without_frame_.data() + without_frame_.size());
  return position;
}

void BatchReader::forget_phrases() {
  for (Phrase* phrase :
       {&chunk_begins_, &sizes_begin_, &key_begins_, &index_, &key_offset_, &value_begins_, &offset_, &length_}) {
    *phrase = {};
  }
}

bool BatchReader::chunk(ChunkRun& run) {
  const size_t start = heap_.columns.numbers.size();
  size_t dims = 0;
  size_t dims_of_sizes = 0;
  const auto keep_size = [&](size_t position) {
    item_.keep_last(numbers_value(position, dims), numbers_value(2 * dims, 0).payload());
  };
  if (!item_.phrase(chunk_begins_, [&] {
        return item_.begin_object(Global::kChunkStorageMetadata, Known::kOffsets) && item_.size_type();
      })) {
    return false;
  }
  if (!item_.shape(dims)) return false;
  keep_size(start);
  if (!item_.phrase(sizes_begin_, [&] { return item_.field(Known::kSizes) && item_.size_type(); })) return false;
  if (!item_.shape(dims_of_sizes) || dims_of_sizes != dims) return false;
  keep_size(start + dims);
  if (!item_.later_fields(Global::kChunkStorageMetadata)) return false;
  if (!item_.end_object() || (run.count > 0 && run.dims != dims)) return false;
  run.dims = static_cast<uint32_t>(dims);
  ++run.count;
  run.sound = run.sound && is_sound(item_.numbers(), item_.numbers() + dims, dims);
  return true;
}

bool BatchReader::row() {
  StorageRows& rows = heap_.columns.rows;
  const size_t row = rows.size();
  uint32_t fqn = 0;
  uint32_t file = 0;
  bool is_new = false;
  int64_t hint = StorageRows::kNoIndex;
  size_t dims = StorageRows::kNoOffset;
  int64_t offset = 0;
  int64_t length = 0;

  if (!item_.phrase(key_begins_, [&] { return item_.begin_object(Global::kMetadataIndex, Known::kFqn); })) return false;
  if (!item_.text(fqn, is_new)) return false;
  if (is_new) item_.keep_last(Value(Tag::kRowFqn, row), 1);
  if (!item_.phrase(index_, [&] { return item_.field(Known::kIndex); })) return false;
  if (!item_.opcode('N') && (!item_.integer(hint) || hint == StorageRows::kNoIndex)) return false;
  if (!item_.stands_at('u')) {
    if (!item_.phrase(key_offset_, [&] { return item_.field(Known::kOffset) && item_.size_type(); }) ||
        !item_.shape(dims))
      return false;
    item_.keep_last(Value(Tag::kRowOffset, row), 1);
  }
  if (!item_.phrase(value_begins_, [&] {
        return item_.end_object() && item_.begin_object(Global::kStorageInfo, Known::kRelativePath);
      })) {
    return false;
  }
  if (!item_.text(file, is_new)) return false;
  if (is_new) item_.keep_last(Value(Tag::kText, file), 0);
  if (!item_.phrase(offset_, [&] { return item_.field(Known::kOffset); }) || !item_.integer(offset)) return false;
  if (!item_.phrase(length_, [&] { return item_.field(Known::kLength); }) || !item_.integer(length)) {
    return false;
  }
  if (!item_.later_fields(Global::kStorageInfo) || !item_.end_object()) return false;

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

}  // namespace dcp_fast::metadata
