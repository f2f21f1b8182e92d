#include "metadata/unpickler.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "metadata/failure.h"
#include "metadata/memo.h"
#include "metadata/objects.h"
#include "metadata/sequences.h"
#include "metadata/text.h"

namespace dcp_fast::metadata {

namespace {

class Unpickler {
 public:
  Unpickler(checkpoint::Bytes file, Heap& heap)
      : heap_(heap), data_(reinterpret_cast<const uint8_t*>(file.data())), size_(file.size()) {}

  Value run() {
    try {
      while (true) {
        opcode_at_ = at_;
        const uint8_t opcode = take(1)[0];
        if (opcode == '.') return pop();
        if (!memo(opcode) && !scalar(opcode) && !container(opcode) && !object(opcode)) unknown(opcode);
      }
    } catch (Error& error) {
      error.offset = static_cast<int64_t>(opcode_at_);
      error.length = static_cast<int64_t>(std::min(std::max(at_, opcode_at_ + 1), size_) - opcode_at_);
      throw;
    } catch (const Unsupported& reason) {
      unsupported(std::string(reason.what()) + " at byte " + std::to_string(opcode_at_));
    }
  }

 private:
  // Numbers, texts and singletons

  bool scalar(uint8_t opcode) {
    switch (opcode) {
      case 'N':  // NONE
        return push(Value(Tag::kNone));
      case 0x88:  // NEWTRUE
        return push(Value::of(true));
      case 0x89:  // NEWFALSE
        return push(Value::of(false));
      case 'K':  // BININT1
        return push(Value::of(static_cast<int64_t>(take(1)[0])));
      case 'M':  // BININT2
        return push(Value::of(static_cast<int64_t>(unsigned_integer(2))));
      case 'J':  // BININT
        return push(Value::of(int64_t{static_cast<int32_t>(unsigned_integer(4))}));
      case 0x8a:  // LONG1
        return binary_number(unsigned_integer(1));
      case 0x8b:  // LONG4
        return binary_number(unsigned_integer(4));
      case 'I':  // INT
        return text_number(line());
      case 'L': {  // LONG
        const std::string_view digits = line();
        return text_number(!digits.empty() && digits.back() == 'L' ? digits.substr(0, digits.size() - 1) : digits);
      }
      case 'G':  // BINFLOAT
        return literal(8);
      case 'C':  // SHORT_BINBYTES
        return literal(unsigned_integer(1));
      case 'B':  // BINBYTES
        return literal(unsigned_integer(4));
      case 0x8e:  // BINBYTES8
        return literal(unsigned_integer(8));
      case 0x8c:  // SHORT_BINUNICODE
        return text(unsigned_integer(1));
      case 'X':  // BINUNICODE
        return text(unsigned_integer(4));
      case 0x8d:  // BINUNICODE8
        return text(unsigned_integer(8));
      case 'V':  // UNICODE
        return escaped_text(line());
      default:
        return false;
    }
  }

  bool number(int64_t value) {
    if (Value::fits(value)) return push(Value::of(value));
    heap_.ints.push_back(value);
    return push(Value(Tag::kBigInt, heap_.ints.size() - 1));
  }
  bool binary_number(uint64_t width) {
    if (width > 8) return literal(width);
    const uint64_t bits = unsigned_integer(static_cast<size_t>(width));
    const bool negative = width > 0 && (data_[at_ - 1] & 0x80) != 0;
    const uint64_t sign = negative && width < 8 ? ~uint64_t{0} << (8 * width) : 0;
    return number(static_cast<int64_t>(bits | sign));
  }
  bool text_number(std::string_view digits) {
    if (digits == "00" || digits == "01") return push(Value::of(digits == "01"));
    int64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size()) unsupported("a number in another form");
    return number(value);
  }
  bool literal(uint64_t length) {
    take(length);
    return push(Value(Tag::kLiteral, opcode_at_));
  }
  bool text(uint64_t length) {
    if (length > Text::kMaxLength) {
      take(length);
      unsupported("a text of more than a megabyte");
    }
    const uint64_t position = at_;
    const auto* bytes = reinterpret_cast<const char*>(take(length));
    if (!is_utf8({bytes, static_cast<size_t>(length)})) corrupt("a text that is not UTF-8");
    return push(Text{position, static_cast<size_t>(length)}.value());
  }
  bool escaped_text(std::string_view escaped) {
    const size_t begin = heap_.decoded.size();
    if (!append_decoded(escaped, heap_.decoded)) corrupt("a text with a broken escape");
    const size_t length = heap_.decoded.size() - begin;
    if (length > Text::kMaxLength) unsupported("a text of more than a megabyte");
    return push(Text{size_ + begin, length}.value());
  }

  // The memo

  bool memo(uint8_t opcode) {
    switch (opcode) {
      case 0x94:  // MEMOIZE
        return memoize(memo_.count());
      case 'q':  // BINPUT
        return memoize(unsigned_integer(1));
      case 'r':  // LONG_BINPUT
        return memoize(unsigned_integer(4));
      case 'p':  // PUT
        return memoize(text_index());
      case 'h':  // BINGET
        return recall(unsigned_integer(1));
      case 'j':  // LONG_BINGET
        return recall(unsigned_integer(4));
      case 'g':  // GET
        return recall(text_index());
      default:
        return false;
    }
  }

  uint64_t text_index() {
    const std::string_view digits = line();
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size()) corrupt("a memo index that is no number");
    return value;
  }
  bool memoize(uint64_t index) {
    // Writers count from zero, and each entry takes bytes of the file.
    if (index >= size_) corrupt("a memo index beyond what the file can hold");
    const Value value = top();
    if (!memo_.put(index, value, keep())) unsupported("a memo that is not written in order");
    return true;
  }
  // What is on top of the stack is of no use once the object that it is for is made.
  Keep keep() const {
    switch (stack_.back().tag()) {
      case Tag::kIntsInTuple:
      case Tag::kChunk:
      case Tag::kIndex:
      case Tag::kStorageInfo:
        return Keep::kNo;
      case Tag::kInts:
        return stack_.size() > 1 && is_size_type(stack_[stack_.size() - 2]) ? Keep::kNo : Keep::kYes;
      case Tag::kDict:
        return stack_.size() > 1 && has_fields(stack_[stack_.size() - 2]) ? Keep::kNo : Keep::kYes;
      default:
        return Keep::kYes;
    }
  }
  static bool is_size_type(Value value) { return value == Value(Tag::kGlobal, static_cast<uint64_t>(Global::kSize)); }
  static bool has_fields(Value value) {
    return value.is(Tag::kChunk) || value.is(Tag::kIndex) || value.is(Tag::kStorageInfo);
  }
  bool recall(uint64_t index) {
    const Value value = memo_.get(index);
    if (!value.is(Tag::kUnset)) return push(value);
    if (memo_.was_put(index)) unsupported("a part of an object that is used again");
    corrupt("a memo index that was never written");
  }

  // Tuples, lists, dicts

  bool container(uint8_t opcode) {
    switch (opcode) {
      case '(':  // MARK
        marks_.push_back(stack_.size());
        fence_ = stack_.size();
        return true;
      case '0':  // POP
        if (stack_.size() == fence_ && !marks_.empty()) {
          pop_mark();
        } else {
          pop();
        }
        return true;
      case '1':  // POP_MARK
        stack_.resize(pop_mark());
        return true;
      case ')':  // EMPTY_TUPLE
        return push(Value(Tag::kInts, 0));
      case 't':  // TUPLE
        return tuple(pop_mark());
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        need(opcode - 0x84U);
        return tuple(stack_.size() - (opcode - 0x84U));
      case ']':  // EMPTY_LIST
        return push(new_list(heap_));
      case 'l': {  // LIST
        const size_t begin = pop_mark();
        const Value list = new_list(heap_);
        append(heap_, heap_.lists[list.payload()], stack_.data() + begin, stack_.size() - begin);
        return replace(begin, list);
      }
      case 'a':  // APPEND
        need(1);
        return extend_list(stack_.size() - 1);
      case 'e':  // APPENDS
        return extend_list(pop_mark());
      case '}':  // EMPTY_DICT
        return push(new_dict(heap_));
      case 'd': {  // DICT
        const size_t begin = pop_mark();
        stack_.insert(stack_.begin() + static_cast<std::ptrdiff_t>(begin), new_dict(heap_));
        return extend_dict(begin + 1);
      }
      case 's':  // SETITEM
        need(2);
        return extend_dict(stack_.size() - 2);
      case 'u':  // SETITEMS
        return extend_dict(pop_mark());
      default:
        return false;
    }
  }

  bool tuple(size_t begin) { return replace(begin, new_tuple(heap_, stack_.data() + begin, stack_.size() - begin)); }

  // What a list or dict is given stands on the stack from `begin` on, and it itself below.
  Value below(size_t begin) {
    if (begin <= fence_) corrupt("an opcode that needs more values than there are");
    return stack_[begin - 1];
  }
  bool extend_list(size_t begin) {
    const Value list = below(begin);
    if (!list.is(Tag::kList)) unsupported("items for what is no list");
    append(heap_, heap_.lists[list.payload()], stack_.data() + begin, stack_.size() - begin);
    stack_.resize(begin);
    return true;
  }
  bool extend_dict(size_t begin) {
    const Value value = below(begin);
    if (!value.is(Tag::kDict)) unsupported("keys for what is no dict");
    Dict* dict = heap_.dict(value);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    if ((stack_.size() - begin) % 2 != 0) corrupt("a key without a value");
    const Value* items = stack_.data() + begin;
    const size_t count = stack_.size() - begin;
    if (dict->sequence.items == 0 && at_ < size_ && data_[at_] == 'b' && begin >= fence_ + 2) {
      // All fields of an object at once, as nearly all objects have them: BUILD follows, and the dict is not needed.
      ++at_;
      free_dict(heap_, value);
      set_fields(heap_, stack_[begin - 2], items, count);
      stack_.resize(begin - 1);
      return true;
    }
    append(heap_, dict->sequence, items, count);
    stack_.resize(begin);
    return true;
  }

  // Globals and objects

  bool object(uint8_t opcode) {
    switch (opcode) {
      case 0x80:  // PROTO
        protocol_ = static_cast<int>(unsigned_integer(1));
        if (protocol_ > 5) corrupt("pickle protocol " + std::to_string(protocol_));
        return true;
      case 0x95: {  // FRAME
        const uint64_t length = unsigned_integer(8);
        if (length > size_ - at_) corrupt("a frame beyond the end of the file");
        return true;
      }
      case 'c': {  // GLOBAL
        const std::string_view module = line();
        return push(global(module, line()));
      }
      case 0x93: {  // STACK_GLOBAL
        need(2);
        const Value name = pop();
        const Value module = pop();
        if (!name.is(Tag::kText) || !module.is(Tag::kText)) corrupt("a global whose name is no text");
        return push(global(heap_.text(module), heap_.text(name)));
      }
      case 'R': {  // REDUCE
        need(2);
        const Value arguments = pop();
        const Value callable = pop();
        return push(call(heap_, callable, arguments));
      }
      case 0x81: {  // NEWOBJ
        need(2);
        const Value arguments = pop();
        if (!arguments.is(Tag::kInts) || heap_.tuple_size(arguments) != 0) unsupported("an object with arguments");
        return push(new_object(heap_, pop()));
      }
      case 'b':  // BUILD
        return build();
      default:
        return false;
    }
  }

  Value global(std::string_view module, std::string_view name) const {
    const auto value = find_global(module, name, protocol_);
    if (!value) unsupported("the global " + std::string(module) + "." + std::string(name));
    return *value;
  }

  bool build() {
    need(2);
    const Value state = pop();
    if (!state.is(Tag::kDict)) {
      set_state(heap_, top(), state);
      return true;
    }
    Dict* dict = heap_.dict(state);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    fields_.clear();
    for_each_item(heap_, dict->sequence, [&](Value item) { fields_.push_back(item); });
    free_dict(heap_, state);
    set_fields(heap_, top(), fields_.data(), fields_.size());
    return true;
  }

  [[noreturn]] static void unknown(uint8_t opcode) {
    // DUP, sets, bytearrays, buffers, other calls, persistent ids, the extension registry; texts and floats of
    // Python 2.
    constexpr std::string_view kUnsupported = "2STUFPQio\x82\x83\x84\x8f\x90\x91\x92\x96\x97\x98";
    const std::string name = "opcode " + std::to_string(opcode);
    if (kUnsupported.find(static_cast<char>(opcode)) != std::string_view::npos) unsupported(name);
    corrupt("no such " + name);
  }

  // The file

  const uint8_t* take(uint64_t count) {
    if (count > size_ - at_) {
      at_ = size_;
      corrupt("the pickle ends early");
    }
    const uint8_t* begin = data_ + at_;
    at_ += count;
    return begin;
  }
  uint64_t unsigned_integer(size_t width) {
    const uint8_t* bytes = take(width);
    uint64_t value = 0;
    for (size_t i = 0; i < width; ++i) value |= uint64_t{bytes[i]} << (8 * i);
    return value;
  }
  // Without the newline.
  std::string_view line() {
    const void* newline = std::memchr(data_ + at_, '\n', size_ - at_);
    if (newline == nullptr) corrupt("the pickle ends early");
    const auto* begin = reinterpret_cast<const char*>(data_ + at_);
    const std::string_view result(begin, static_cast<size_t>(static_cast<const char*>(newline) - begin));
    at_ += result.size() + 1;
    return result;
  }

  // The stack

  void need(size_t count) const {
    if (stack_.size() - fence_ < count) corrupt("an opcode that needs more values than there are");
  }
  bool push(Value value) {
    stack_.push_back(value);
    return true;
  }
  Value top() const {
    need(1);
    return stack_.back();
  }
  Value pop() {
    need(1);
    const Value value = stack_.back();
    stack_.pop_back();
    return value;
  }
  bool replace(size_t begin, Value value) {
    stack_.resize(begin);
    return push(value);
  }
  size_t pop_mark() {
    if (marks_.empty()) corrupt("an opcode that needs a mark");
    const size_t mark = marks_.back();
    marks_.pop_back();
    fence_ = marks_.empty() ? 0 : marks_.back();
    return mark;
  }

  Heap& heap_;
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  size_t opcode_at_ = 0;
  int protocol_ = 0;
  std::vector<Value> stack_;
  std::vector<size_t> marks_;  // sizes of the stack
  size_t fence_ = 0;           // the last of them
  Memo memo_;
  std::vector<Value> fields_;
};

}  // namespace

Value unpickle(checkpoint::Bytes file, Heap& heap) {
  if (file.size() > Text::kMaxPosition / 2) unsupported("a file of this size");
  heap.file = file;
  heap.ints.push_back(0);
  return Unpickler(file, heap).run();
}

}  // namespace dcp_fast::metadata
