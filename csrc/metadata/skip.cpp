#include "metadata/skip.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "metadata/failure.h"

namespace dcp_fast::metadata {

namespace {

// Nobody nests deeper; Python's pickler gives up at a fraction of it.
constexpr size_t kMaxMarks = 10'000;

enum class Operand : uint8_t { kNone, kFixed, kLength, kTwoLines, kFrameLength };

// What an opcode does to the stack.
struct Effect {
  bool is_known = false;
  Operand operand = Operand::kNone;
  uint8_t width = 0;     // of the operand, or of its length
  bool to_mark = false;  // takes all values down to the last mark, and the mark
  uint8_t needs = 0;     // how many values it takes or changes then
  uint8_t leaves = 0;    // how many of these are there afterwards, changed or new
};

constexpr Effect pushes(Operand operand = Operand::kNone, uint8_t width = 0) {
  return {true, operand, width, false, 0, 1};
}
constexpr Effect takes(uint8_t needs) { return {true, Operand::kNone, 0, false, needs, 1}; }
constexpr Effect takes_to_mark(uint8_t needs) { return {true, Operand::kNone, 0, true, needs, 1}; }
constexpr Effect memoizes(Operand operand, uint8_t width = 0) { return {true, operand, width, false, 0, 0}; }

constexpr Effect effect_of(uint8_t opcode) {
  switch (opcode) {
    case 'N':   // NONE
    case 0x88:  // NEWTRUE
    case 0x89:  // NEWFALSE
    case ')':   // EMPTY_TUPLE
    case ']':   // EMPTY_LIST
    case '}':   // EMPTY_DICT
    case 0x8f:  // EMPTY_SET
      return pushes();
    case 'K':  // BININT1
    case 'h':  // BINGET
      return pushes(Operand::kFixed, 1);
    case 'M':  // BININT2
      return pushes(Operand::kFixed, 2);
    case 'J':  // BININT
    case 'j':  // LONG_BINGET
      return pushes(Operand::kFixed, 4);
    case 'G':  // BINFLOAT
      return pushes(Operand::kFixed, 8);
    case 0x8a:  // LONG1
    case 0x8c:  // SHORT_BINUNICODE
    case 'C':   // SHORT_BINBYTES
      return pushes(Operand::kLength, 1);
    case 0x8b:  // LONG4
    case 'X':   // BINUNICODE
    case 'B':   // BINBYTES
      return pushes(Operand::kLength, 4);
    case 0x8d:  // BINUNICODE8
    case 0x8e:  // BINBYTES8
      return pushes(Operand::kLength, 8);
    case 'c':  // GLOBAL
      return pushes(Operand::kTwoLines);
    case 0x94:  // MEMOIZE
      return memoizes(Operand::kNone);
    case 'q':  // BINPUT
      return memoizes(Operand::kFixed, 1);
    case 'r':  // LONG_BINPUT
      return memoizes(Operand::kFixed, 4);
    case 0x95:  // FRAME
      return {true, Operand::kFrameLength, 8, false, 0, 0};
    case 0x85:  // TUPLE1
      return takes(1);
    case 0x86:  // TUPLE2
    case 0x81:  // NEWOBJ
    case 'R':   // REDUCE
    case 0x93:  // STACK_GLOBAL
    case 'b':   // BUILD
    case 'a':   // APPEND
      return takes(2);
    case 0x87:  // TUPLE3
    case 's':   // SETITEM
      return takes(3);
    case 't':   // TUPLE
    case 0x91:  // FROZENSET
      return takes_to_mark(0);
    case 'e':   // APPENDS
    case 'u':   // SETITEMS
    case 0x90:  // ADDITEMS
      return takes_to_mark(1);
    default:  // what no pickler of protocol 2 or later writes for plain objects
      return {};
  }
}

constexpr std::array<Effect, 256> all_effects() {
  std::array<Effect, 256> effects{};
  for (size_t opcode = 0; opcode < effects.size(); ++opcode) effects[opcode] = effect_of(static_cast<uint8_t>(opcode));
  return effects;
}
constexpr std::array<Effect, 256> kEffects = all_effects();

bool is_text(uint8_t opcode) { return opcode == 0x8c || opcode == 'X' || opcode == 0x8d; }

class Skipper {
 public:
  Skipper(Heap& heap, Memo& memo, Cursor& cursor) : heap_(heap), memo_(memo), cursor_(cursor) {}

  std::optional<SkippedFields> run(const Value* values, const std::vector<size_t>& heights) {
    for (size_t i = 0; i < heights.front(); ++i) fields_.push_back(name_of(values[i]));
    untouched_ = heights.front();
    below_.assign(heights.begin(), heights.end() - 1);
    height_ = heights.back();
    while (true) {
      if (!below_.empty()) skip_common();
      const uint8_t opcode = cursor_.take(1)[0];
      if (opcode == 'u' && below_.empty()) return finish();
      if (!skip(opcode)) return std::nullopt;
    }
  }

 private:
  static constexpr uint32_t kNone = TextTable::kNone;

  // The index of a text; kNone for any other value.
  uint32_t name_of(Value value) const {
    if (value.is(Tag::kRowFqn)) return heap_.columns.rows.fqn[value.payload()];
    return value.is(Tag::kText) ? static_cast<uint32_t>(value.payload()) : kNone;
  }

  // All fields are there: BUILD and STOP must follow.
  std::optional<SkippedFields> finish() {
    if (height_ % 2 != 0) corrupt("a key without a value");
    if (cursor_.take(1)[0] != 'b' || cursor_.take(1)[0] != '.') return std::nullopt;
    SkippedFields result{untouched_, {}};
    for (size_t key = untouched_ / 2 * 2; key < fields_.size(); key += 2) {
      if (fields_[key] == kNone) return std::nullopt;
      result.names.push_back(fields_[key]);
    }
    return result;
  }

  // Any opcode at any depth. False for one that cannot be skipped.
  bool skip(uint8_t opcode) {
    if (opcode == '(') {
      if (below_.size() == kMaxMarks) return false;
      below_.push_back(height_);
      height_ = 0;
      return true;
    }
    const Effect& effect = kEffects.at(opcode);
    if (!effect.is_known || (effect.to_mark && below_.empty())) return false;
    // Where names of fields may stand.
    const bool is_field = below_.empty() && effect.needs == 0 && effect.leaves == 1;
    uint32_t name = kNone;
    if (is_field && !read_name(opcode, effect, name)) return false;
    if (name == kNone) skip_operand(effect);
    if (effect.to_mark) {
      height_ = below_.back();
      below_.pop_back();
    }
    if (height_ < effect.needs) corrupt("an opcode that needs more values than there are");
    height_ -= effect.needs;
    if (below_.empty() && effect.leaves > 0) {
      untouched_ = std::min(untouched_, height_);
      fields_.resize(height_, kNone);
      fields_.push_back(name);
    }
    height_ += effect.leaves;
    return true;
  }

  // The text that an opcode pushes, if it is one that is known; its operand is taken then. Else finish() finds out
  // whether it stands for a name, which only the memo of what was skipped could tell. False if the text is too long to
  // be a name.
  bool read_name(uint8_t opcode, const Effect& effect, uint32_t& name) {
    const uint64_t begin = cursor_.position();
    if (opcode == 'h' || opcode == 'j') {
      name = name_of(memo_.get(cursor_.unsigned_integer(effect.width)));
      if (name == kNone) cursor_.seek(begin);
      return true;
    }
    if (!is_text(opcode)) return true;
    const uint64_t length = cursor_.unsigned_integer(effect.width);
    cursor_.require(length);
    if (length > kMaxText) return false;
    name = heap_.intern({reinterpret_cast<const char*>(cursor_.take(length)), static_cast<size_t>(length)});
    if (name == kNone) corrupt("a text that is not UTF-8");
    return true;
  }

  void skip_operand(const Effect& effect) {
    switch (effect.operand) {
      case Operand::kNone:
        return;
      case Operand::kFixed:
        pass(effect.width);
        return;
      case Operand::kLength:
        pass(cursor_.unsigned_integer(effect.width));
        return;
      case Operand::kFrameLength:
        cursor_.require_frame();
        return;
      case Operand::kTwoLines:
        cursor_.line();
        cursor_.line();
        return;
    }
  }
  void pass(uint64_t count) {
    cursor_.require(count);
    cursor_.seek(cursor_.position() + count);
  }

  // Common opcodes below the fields, of which there may be many millions: without the table, for whose answer the next
  // opcode would have to wait, and several in one step where pickle writes them together. Stops before any other
  // opcode, and before one that may be an error.
  void skip_common() {
    constexpr size_t kLongest = 16;  // of what one step looks at
    const Window window = cursor_.window(kLongest);
    if (static_cast<size_t>(window.end - window.begin) < kLongest) return;
    const uint8_t* at = window.begin;
    const uint8_t* last = window.end - kLongest;
    size_t height = height_;
    const auto stand_at = [](const uint8_t* begin, std::string_view opcodes) {
      return std::memcmp(begin, opcodes.data(), opcodes.size()) == 0;
    };
    const auto begin_level = [&](size_t opcode_bytes, size_t values_below) {
      if (below_.size() == kMaxMarks) return false;
      at += opcode_bytes;
      below_.push_back(values_below);
      height = 0;
      return true;
    };
    const auto skip_one = [&] {
      switch (*at) {
        case 'h':
        case 'K':
          at += 2;
          ++height;
          return true;
        case 'J':
          at += 5;
          ++height;
          return true;
        case 'M':
          at += 3;
          ++height;
          return true;
        case 0x8c:
        case 0x8a: {
          const size_t size = size_t{2} + at[1];
          if (size >= static_cast<size_t>(window.end - at)) return false;
          at += size;
          ++height;
          if (*at == 0x94) ++at;
          return true;
        }
        case 0x94:
          ++at;
          return true;
        case ')':
          // A new object, and the mark for its state: a tuple, or a dict of its fields.
          if (height > 0 && stand_at(at, ")\x81\x94}\x94(")) return begin_level(6, height + 1);
          if (height > 0 && stand_at(at, ")\x81\x94(")) return begin_level(4, height);
          [[fallthrough]];
        case 'N':
        case 0x88:
        case 0x89:
        case ']':
        case '}':
          ++at;
          ++height;
          return true;
        case 0x87:
        case 0x86:
        case 0x85: {
          const size_t items = *at - size_t{0x84};
          if (height <= items) return false;
          height -= items - 1;
          ++at;
          if (stand_at(at, "\x94\x85\x94R\x94")) {  // it is the argument of torch.Size
            at += 5;
            --height;
          }
          return true;
        }
        case 0x81:
        case 'R':
        case 'b':
          if (height < 2) return false;
          ++at;
          --height;
          return true;
        case '(':
          return begin_level(1, height);
        case 't':
          if (below_.size() == 1) return false;
          ++at;
          height = below_.back() + 1;
          below_.pop_back();
          if (height >= 2 && stand_at(at, "\x94\x62")) {  // it is the state of an object
            at += 2;
            --height;
          }
          return true;
        case 'u':
        case 'e':
          if (below_.size() == 1 || below_.back() == 0) return false;
          ++at;
          height = below_.back();
          below_.pop_back();
          if (height >= 2 && *at == 'b') {  // they are the fields of an object
            ++at;
            --height;
          }
          return true;
        default:
          return false;
      }
    };
    do {
      // Names of fields, and much of what they hold.
      for (; *at == 'j' && at < last; at += 5) ++height;
      for (; *at == 'h' && at < last; at += 2) ++height;
    } while (at <= last && skip_one() && at <= last);
    cursor_.advance_to(at);
    height_ = height;
  }

  Heap& heap_;
  Memo& memo_;
  Cursor& cursor_;
  std::vector<uint32_t> fields_;  // what stands on the stack for the fields: names where there are texts
  std::vector<size_t> below_;     // how many values are above each mark but the last, up to the next one
  size_t height_ = 0;             // and above the last
  size_t untouched_ = 0;
};

}  // namespace

std::optional<SkippedFields> skip_fields(Heap& heap, Memo& memo, const Value* values,
                                         const std::vector<size_t>& heights, Cursor& cursor) {
  return Skipper(heap, memo, cursor).run(values, heights);
}

}  // namespace dcp_fast::metadata
