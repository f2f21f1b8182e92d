#include "metadata/columns_stream.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "metadata/columns_section.h"
#include "metadata/failure.h"

namespace dcp_fast::metadata {

namespace {

// The arrays that are sent as they are: all there is to change when columns get an array of numbers, or lose one.
template <typename AnyColumns, typename Visit>
void for_each_array(AnyColumns& columns, const Visit& visit) {
  visit(columns.numbers);
  visit(columns.rows.fqn);
  visit(columns.rows.dims);
  visit(columns.rows.chunk_offset);
  visit(columns.rows.index);
  visit(columns.rows.file);
  visit(columns.rows.offset);
  visit(columns.rows.length);
  visit(columns.rows.transforms);
}

// The first section of any columns takes a small multiple of their file: a text at most twice what it takes there, an
// entry 48 bytes, planner data 16 times what it takes.
constexpr uint64_t kMostOfFile = 128;
constexpr uint64_t kMostAnyway = 4096;

bool plausible(const std::vector<uint64_t>& sizes, uint64_t file_bytes) {
  if (sizes.size() != section_count() || sizes[0] > kMostAnyway + kMostOfFile * file_bytes) return false;
  Columns columns;
  size_t section = 1;
  bool result = true;
  // An item takes at least a byte of the file.
  for_each_array(columns, [&](const auto& array) {
    const uint64_t size = sizes[section++];
    result = result && size % sizeof(array[0]) == 0 && size / sizeof(array[0]) <= file_bytes;
  });
  return result;
}

template <typename T>
std::byte* grow(void* array, size_t bytes) {
  auto& items = *static_cast<std::vector<T>*>(array);
  items.resize((bytes + sizeof(T) - 1) / sizeof(T));
  return reinterpret_cast<std::byte*>(items.data());
}

}  // namespace

size_t section_count() {
  size_t count = 1;
  Columns columns;
  for_each_array(columns, [&](const auto& /*array*/) { ++count; });
  return count;
}

ColumnsEncoder::ColumnsEncoder(std::shared_ptr<const Columns> columns, uint64_t file_bytes)
    : columns_(std::move(columns)), first_(encode_first_section(*columns_)) {
  if (!numbers_are_small(columns_->numbers)) unsupported("sizes near what 64 bits count");
  const auto add = [&](const auto& array) {
    const Section section = {reinterpret_cast<const std::byte*>(array.data()), array.size() * sizeof(array[0])};
    sections_.push_back(section);
    sizes_.push_back(section.size);
  };
  add(first_);
  for_each_array(*columns_, add);
  if (!plausible(sizes_, file_bytes)) unsupported("columns that are large for their file");
}

size_t ColumnsEncoder::read(std::byte* to, size_t size) {
  size_t done = 0;
  while (done < size && section_ < sections_.size()) {
    const Section& section = sections_[section_];
    const auto count = static_cast<size_t>(std::min<uint64_t>(size - done, section.size - position_));
    if (count > 0) std::memcpy(to + done, section.data + position_, count);
    done += count;
    position_ += count;
    if (position_ == section.size) {
      ++section_;
      position_ = 0;
    }
  }
  return done;
}

ColumnsDecoder::ColumnsDecoder(std::vector<uint64_t> sizes, uint64_t file_bytes)
    : sizes_(std::move(sizes)), file_bytes_(file_bytes) {
  if (!plausible(sizes_, file_bytes)) corrupt("the sizes of columns contradict that of their file");
  const auto add = [&](auto& array) {
    using T = typename std::remove_reference_t<decltype(array)>::value_type;
    array.reserve(static_cast<size_t>(sizes_[sections_.size()] / sizeof(T)));
    sections_.push_back({&array, &grow<T>});
  };
  add(first_);
  for_each_array(columns_, add);
}

bool ColumnsDecoder::is_complete() {
  while (section_ < sections_.size() && position_ == sizes_[section_]) {
    ++section_;
    position_ = 0;
  }
  return section_ == sections_.size();
}

void ColumnsDecoder::write(const std::byte* from, size_t size) {
  // Small enough to be in the cache still when the bytes come after the zeros with which memory grows.
  constexpr size_t kPiece = size_t{64} << 10;
  while (size > 0) {
    if (is_complete()) corrupt("more bytes of columns than there should be");
    const Section& section = sections_[section_];
    const auto count = static_cast<size_t>(std::min<uint64_t>({size, kPiece, sizes_[section_] - position_}));
    std::memcpy(section.grow(section.array, static_cast<size_t>(position_) + count) + position_, from, count);
    position_ += count;
    from += count;
    size -= count;
  }
}

Columns ColumnsDecoder::finish() {
  if (!is_complete()) corrupt("fewer bytes of columns than there should be");
  try {
    decode_first_section(checkpoint::Bytes(reinterpret_cast<const std::byte*>(first_.data()), first_.size()), columns_);
    check_numbers(columns_, file_bytes_);
  } catch (const Unsupported& reason) {
    corrupt(reason.what());
  }
  return std::move(columns_);
}

}  // namespace dcp_fast::metadata
