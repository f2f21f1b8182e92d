#include "metadata/unpickler.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "little_endian.h"
#include "metadata/batch_reader.h"
#include "metadata/collect.h"
#include "metadata/cursor.h"
#include "metadata/failure.h"
#include "metadata/memo.h"
#include "metadata/objects.h"
#include "metadata/sequences.h"
#include "metadata/skip.h"
#include "metadata/stack.h"

namespace dcp_fast::metadata {

namespace {

class Unpickler {
 public:
  Unpickler(Source& source, Batches batches, Heap& heap)
      : heap_(heap), cursor_(source), batches_(batches), batch_reader_(heap, memo_, cursor_) {}

  Value run() {
    try {
      return run_opcodes();
    } catch (Error& error) {
      if (error.kind != ErrorKind::kCorruptMetadata) throw;
      const uint64_t end = std::min(std::max(cursor_.position(), opcode_at_ + 1), cursor_.size());
      error.offset = static_cast<int64_t>(opcode_at_);
      error.length = static_cast<int64_t>(end - opcode_at_);
      throw;
    } catch (const Unsupported& reason) {
      unsupported(std::string(reason.what()) + " at byte " + std::to_string(opcode_at_));
    }
  }

 private:
  Value run_opcodes() {
    try {
      while (true) {
        opcode_at_ = cursor_.position();
        before_ = stack_.state();
        const uint8_t opcode = cursor_.take(1)[0];
        if (opcode == '.') return stack_.pop();
        if (!memo(opcode) && !scalar(opcode) && !container(opcode) && !object(opcode)) unknown(opcode);
      }
    } catch (const Unsupported&) {
      if (!skip_attributes()) throw;
      return stack_[0];
    }
  }

  // Whether what is unsupported belongs to an attribute of the metadata that torch's class does not have. Then it and
  // what comes after it is left unmade, and the metadata gets its fields.
  bool skip_attributes() {
    // As if the opcode had not begun. Values that it took are of the attribute, and their places count, not they.
    stack_.restore(before_);
    if (!stack_.has_mark() || stack_.first_mark() != 2 || !stack_[0].is(Tag::kMetadata) || !stack_[1].is(Tag::kDict)) {
      return false;
    }
    const Dict* dict = heap_.dict(stack_[1]);
    if (dict == nullptr || dict->sequence.items > 0) return false;
    const std::vector<size_t> heights = stack_.heights();
    const Value* fields = stack_.data() + stack_.first_mark();
    const auto is_attribute = [&](Value value) {
      return value.is(Tag::kText) && !is_metadata_field(heap_.text(value));
    };
    bool has_attributes = false;
    for (size_t i = 0; i < heights[0]; i += 2) has_attributes = has_attributes || is_attribute(fields[i]);
    if (!has_attributes) return false;
    cursor_.seek(opcode_at_);
    const auto skipped = skip_fields(heap_, memo_, fields, heights, cursor_);
    if (!skipped) return false;
    fields_.assign(fields, fields + skipped->untouched / 2 * 2);
    for (const uint32_t name : skipped->names) {
      fields_.emplace_back(Tag::kText, name);
      if (!is_attribute(fields_.back())) return false;
      fields_.emplace_back();
    }
    set_fields(heap_, stack_[0], fields_.data(), fields_.size());
    return true;
  }

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
        return push(Value::of(static_cast<int64_t>(cursor_.take(1)[0])));
      case 'M':  // BININT2
        return push(Value::of(static_cast<int64_t>(cursor_.unsigned_integer(2))));
      case 'J':  // BININT
        return push(Value::of(int64_t{static_cast<int32_t>(cursor_.unsigned_integer(4))}));
      case 0x8a:  // LONG1
        return binary_number(cursor_.unsigned_integer(1));
      case 0x8b:  // LONG4
        return binary_number(cursor_.unsigned_integer(4));
      case 'G':  // BINFLOAT
        return literal(8);
      case 'C':  // SHORT_BINBYTES
        return literal(cursor_.unsigned_integer(1));
      case 'B':  // BINBYTES
        return literal(cursor_.unsigned_integer(4));
      case 0x8e:  // BINBYTES8
        return literal(cursor_.unsigned_integer(8));
      case 0x96: {  // BYTEARRAY8
        const uint64_t length = cursor_.unsigned_integer(8);
        cursor_.require(length);
        cursor_.seek(cursor_.position() + length);
        return push(Value(Tag::kInert));
      }
      case 0x8c:  // SHORT_BINUNICODE
        return text(cursor_.unsigned_integer(1));
      case 'X':  // BINUNICODE
        return text(cursor_.unsigned_integer(4));
      case 0x8d:  // BINUNICODE8
        return text(cursor_.unsigned_integer(8));
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
    const auto bytes = static_cast<size_t>(width);
    return number(signed_from_little_endian(cursor_.take(bytes), bytes));
  }
  // The rest of an opcode that is kept as it is.
  bool literal(uint64_t length) {
    cursor_.require(length);
    const uint64_t end = cursor_.position() + length;
    cursor_.seek(opcode_at_);
    const uint64_t count = end - opcode_at_;
    const auto* bytes = reinterpret_cast<const char*>(cursor_.take(count));
    const size_t position = heap_.literals.size();
    heap_.literals.append(bytes, static_cast<size_t>(count));
    return push(Value(Tag::kLiteral, position));
  }
  bool text(uint64_t length) {
    cursor_.require(length);
    if (length > kMaxText) unsupported("a text of more than a megabyte");
    const auto* bytes = reinterpret_cast<const char*>(cursor_.take(length));
    return push_text({bytes, static_cast<size_t>(length)});
  }
  bool push_text(std::string_view value) {
    const uint32_t index = heap_.intern(value);
    if (index == TextTable::kNone) corrupt("a text that is not UTF-8");
    return push(Value(Tag::kText, index));
  }
  // The memo

  bool memo(uint8_t opcode) {
    switch (opcode) {
      case 0x94:  // MEMOIZE
        return memoize(memo_.count());
      case 'q':  // BINPUT
        return memoize(cursor_.unsigned_integer(1));
      case 'r':  // LONG_BINPUT
        return memoize(cursor_.unsigned_integer(4));
      case 'h':  // BINGET
        return recall(cursor_.unsigned_integer(1));
      case 'j':  // LONG_BINGET
        return recall(cursor_.unsigned_integer(4));
      default:
        return false;
    }
  }

  bool memoize(uint64_t index) {
    // Writers count from zero, and each entry takes bytes of the file.
    if (index >= cursor_.size()) corrupt("a memo index beyond what the file can hold");
    const Value value = stack_.top();
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
    if (!value.is(Tag::kUnset)) return push(batch_reader_.as_value(value));
    if (memo_.was_put(index)) unsupported("a part of an object that is used again");
    corrupt("a memo index that was never written");
  }

  // Tuples, lists, dicts

  bool container(uint8_t opcode) {
    switch (opcode) {
      case '(':  // MARK
        if (batches_ == Batches::kAtOnce && stack_.above_mark() > 0 && batch_reader_.read(stack_.back())) return true;
        stack_.mark();
        return true;
      case '0':  // POP
        if (stack_.above_mark() == 0 && stack_.has_mark()) {
          stack_.pop_mark();
        } else {
          stack_.pop();
        }
        return true;
      case '1':  // POP_MARK
        stack_.shrink(stack_.pop_mark());
        return true;
      case ')':  // EMPTY_TUPLE
        return push(Value(Tag::kInts, 0));
      case 't':  // TUPLE
        return tuple(stack_.pop_mark());
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        stack_.need(opcode - 0x84U);
        return tuple(stack_.size() - (opcode - 0x84U));
      case ']':  // EMPTY_LIST
        return push(new_list(heap_));
      case 'a':  // APPEND
        stack_.need(1);
        return extend_list(stack_.size() - 1);
      case 'e':  // APPENDS
        return extend_list(stack_.pop_mark());
      case '}':  // EMPTY_DICT
        return push(new_dict(heap_));
      case 's':  // SETITEM
        stack_.need(2);
        return extend_dict(stack_.size() - 2);
      case 'u':  // SETITEMS
        return extend_dict(stack_.pop_mark());
      case 0x8f:  // EMPTY_SET
        return push(Value(Tag::kInert));
      case 0x90: {  // ADDITEMS
        const size_t begin = stack_.pop_mark();
        if (!stack_.below(begin).is(Tag::kInert)) unsupported("items for what is no set");
        stack_.shrink(begin);
        return true;
      }
      case 0x91:  // FROZENSET
        return replace(stack_.pop_mark(), Value(Tag::kInert));
      default:
        return false;
    }
  }

  bool tuple(size_t begin) { return replace(begin, new_tuple(heap_, stack_.data() + begin, stack_.size() - begin)); }

  // What a list or dict is given stands on the stack from `begin` on, and it itself below.
  void extend(Sequence& list, size_t begin) {
    const Value* items = stack_.data() + begin;
    const size_t count = stack_.size() - begin;
    if (!collect_chunks(heap_, list, items, count)) append(heap_, list, items, count);
  }
  bool extend_list(size_t begin) {
    const Value list = stack_.below(begin);
    if (!list.is(Tag::kList) && !list.is(Tag::kInert)) unsupported("items for what is no list");
    if (list.is(Tag::kList)) extend(heap_.lists[list.payload()], begin);
    stack_.shrink(begin);
    return true;
  }
  bool extend_dict(size_t begin) {
    const Value value = stack_.below(begin);
    if (value.is(Tag::kInert)) {
      if ((stack_.size() - begin) % 2 != 0) corrupt("a key without a value");
      stack_.shrink(begin);
      return true;
    }
    if (!value.is(Tag::kDict)) unsupported("keys for what is no dict");
    Dict* dict = heap_.dict(value);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    if ((stack_.size() - begin) % 2 != 0) corrupt("a key without a value");
    const Value* items = stack_.data() + begin;
    const size_t count = stack_.size() - begin;
    if (dict->sequence.items == 0 && begin >= stack_.size() - stack_.above_mark() + 2 && cursor_.next_is('b')) {
      // All fields of an object at once, as nearly all objects have them: BUILD follows, and the dict is not needed.
      cursor_.take(1);
      free_dict(heap_, value);
      set_fields(heap_, stack_[begin - 2], items, count);
      stack_.shrink(begin - 1);
      return true;
    }
    if (!collect_rows(heap_, dict->sequence, items, count)) append(heap_, dict->sequence, items, count);
    stack_.shrink(begin);
    return true;
  }

  // Globals and objects

  bool object(uint8_t opcode) {
    switch (opcode) {
      case 0x80:  // PROTO
        protocol_ = static_cast<int>(cursor_.unsigned_integer(1));
        if (protocol_ > 5) corrupt("pickle protocol " + std::to_string(protocol_));
        return true;
      case 0x95:  // FRAME
        cursor_.require_frame();
        return true;
      case 'c': {  // GLOBAL
        const std::string module(cursor_.line());
        return push(global(module, cursor_.line()));
      }
      case 0x93: {  // STACK_GLOBAL
        stack_.need(2);
        const Value name = stack_.pop();
        const Value module = stack_.pop();
        if (!name.is(Tag::kText) || !module.is(Tag::kText)) corrupt("a global whose name is no text");
        return push(global(heap_.text(module), heap_.text(name)));
      }
      case 'R': {  // REDUCE
        stack_.need(2);
        const Value arguments = stack_.pop();
        const Value callable = stack_.pop();
        return push(call(heap_, callable, arguments));
      }
      case 0x81: {  // NEWOBJ
        stack_.need(2);
        const Value arguments = stack_.pop();
        const Value type = stack_.pop();
        const Value made = new_object(heap_, type);
        const bool has_none = arguments.is(Tag::kInts) && heap_.tuple_size(arguments) == 0;
        if (!has_none && !made.is(Tag::kInert)) unsupported("an object with arguments");
        return push(made);
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
    stack_.need(2);
    const Value state = stack_.pop();
    if (!state.is(Tag::kDict)) {
      set_state(heap_, stack_.top(), state);
      return true;
    }
    const Dict* dict = heap_.dict(state);
    if (dict == nullptr) unsupported("a dict of fields that is used again");
    fields_.clear();
    for_each_item(heap_, dict->sequence, [&](Value item) { fields_.push_back(item); });
    free_dict(heap_, state);
    set_fields(heap_, stack_.top(), fields_.data(), fields_.size());
    return true;
  }

  [[noreturn]] static void unknown(uint8_t opcode) {
    // What protocols 0 and 1 write instead of shorter opcodes; DUP, buffers, other calls, persistent ids, the extension
    // registry; texts and floats of Python 2.
    constexpr std::string_view kUnsupported = "ILVgpld2STUFPQio\x82\x83\x84\x92\x97\x98";
    const std::string name = "opcode " + std::to_string(opcode);
    if (kUnsupported.find(static_cast<char>(opcode)) != std::string_view::npos) unsupported(name);
    corrupt("no such " + name);
  }

  // The stack

  bool push(Value value) {
    stack_.push(value);
    return true;
  }
  bool replace(size_t begin, Value value) {
    stack_.shrink(begin);
    return push(value);
  }

  Heap& heap_;
  Cursor cursor_;
  // Where the opcode at hand begins, and what was there before it.
  uint64_t opcode_at_ = 0;
  Stack::State before_{};
  int protocol_ = 0;
  Stack stack_;
  Memo memo_;
  std::vector<Value> fields_;
  Batches batches_;
  BatchReader batch_reader_;
};

}  // namespace

Value unpickle(Source& source, Batches batches, Heap& heap) { return Unpickler(source, batches, heap).run(); }

}  // namespace dcp_fast::metadata
