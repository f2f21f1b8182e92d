#include "metadata/item_reader.h"

#include <string_view>

#include "little_endian.h"
#include "metadata/objects.h"

namespace dcp_fast::metadata {

namespace {

constexpr uint8_t kMemoize = 0x94;
constexpr uint8_t kTuple1 = 0x85;
constexpr uint8_t kNewObject = 0x81;

}  // namespace

bool ItemReader::begin_object(Global type, Known first_field) {
  return recalls(Value(Tag::kGlobal, static_cast<uint64_t>(type))) && opcode(')') && opcode(kNewObject) && put() &&
         opcode('}') && put() && opcode('(') && field(first_field);
}

// The call of torch.Size without its type.
bool ItemReader::shape(size_t& dims) {
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

bool ItemReader::later_fields(Global type) {
  constexpr uint8_t kNewTrue = 0x88;
  constexpr uint8_t kNewFalse = 0x89;
  while (!stands_at('u')) {
    Value name;
    if (!recall(name) || !name.is(Tag::kText) || name.payload() < kKnownTexts.size()) return false;
    const std::string_view text = heap_.text(name);
    // transform_descriptors is a field of torch's that is rarely there. The unpickler refuses special names.
    if (text == "transform_descriptors" || text.substr(0, 2) == "__") return false;
    int64_t number = 0;
    if (!opcode('N') && !opcode(kNewTrue) && !opcode(kNewFalse) && !integer(number)) return false;
    leave_out(heap_, type, text);
  }
  return true;
}

bool ItemReader::text(uint32_t& index, bool& is_new) {
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

bool ItemReader::integer(int64_t& number) {
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
      number = signed_from_little_endian(at_ + 2, width);
      at_ += 2 + width;
      return true;
    }
    default:
      return false;
  }
}

bool ItemReader::opcode(uint8_t code) {
  if (at_ == end_ || *at_ != code) return false;
  ++at_;
  return true;
}

bool ItemReader::put() {
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

bool ItemReader::recall(Value& value) {
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

bool ItemReader::recalls(Value expected) {
  Value value;
  return recall(value) && value == expected;
}

}  // namespace dcp_fast::metadata
