// Takes a statement apart for the decoder: modifiers from left to right, and operands, each of which fills the
// instruction's next slot. Whatever is missing or does not fit is an error that names the line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "ptx/lexer.h"
#include "ptx/program.h"
#include "ptx/statement.h"
#include "ptx/symbols.h"
#include "ptx/type.h"

namespace simcuda::ptx {

// Most instructions want registers of exactly their type's width; loads, stores and conversions take wider ones too.
enum class RegisterWidth { kExact, kAtLeast };

// Types that an instruction exists for.
struct TypeSet {
  const char* kinds;  // of u, s, b, f and p
  int min_bits;       // but for predicates
};
class StatementReader {
 public:
  StatementReader(const Statement& statement, Symbols& symbols)
      : statement_(statement), symbols_(symbols), modifiers_(split(statement.mnemonic)) {
    instruction_.line = statement.line;
  }

 protected:
  [[noreturn]] void fail(const std::string& message) const {
    throw error_at(statement_.line, statement_.mnemonic + ": " + message);
  }

  // Modifiers are taken from left to right.

  static std::vector<std::string> split(const std::string& mnemonic) {
    std::vector<std::string> parts;
    for (size_t begin = 0; begin <= mnemonic.size();) {
      const size_t end = std::min(mnemonic.find('.', begin), mnemonic.size());
      parts.push_back(mnemonic.substr(begin, end - begin));
      begin = end + 1;
    }
    return parts;
  }

  const std::string& modifier() const {
    static const std::string kNone;
    return next_modifier_ < modifiers_.size() ? modifiers_[next_modifier_] : kNone;
  }

  bool take(const char* name) {
    if (modifier() != name) return false;
    ++next_modifier_;
    return true;
  }

  void take_any(std::initializer_list<const char*> names) {
    for (const char* name : names) {
      if (take(name)) return;
    }
  }

  void require(const char* name) {
    if (!take(name)) fail("expected ." + std::string(name) + ", not ." + modifier());
  }

  Type type(TypeSet known) {
    const std::optional<Type> named = type_named(modifier());
    if (!named || std::strchr(known.kinds, modifier()[0]) == nullptr ||
        (named->kind != TypeKind::kPredicate && named->bits < known.min_bits)) {
      fail("unknown type or modifier ." + modifier());
    }
    ++next_modifier_;
    return *named;
  }

  // Operands too; each fills the instruction's next slot.

  const OperandText& operand(const char* expected) {
    if (next_operand_ == statement_.operands.size()) fail("expected " + std::string(expected));
    return statement_.operands[next_operand_++];
  }

  void add_slot(Slot slot) { instruction_.operands.at(slots_++) = slot; }

  Slot register_named(const std::string& name, int bits, RegisterWidth width) const {
    const Register& found = symbols_.find_register(name, statement_.line);
    const bool fits = width == RegisterWidth::kExact || bits == kPredicateBits || found.bits == kPredicateBits
                          ? found.bits == bits
                          : found.bits >= bits;
    if (!fits) fail("the type does not fit " + name + " of " + std::to_string(found.bits) + " bits");
    return found.slot;
  }

  void destination(int bits, RegisterWidth width = RegisterWidth::kExact) {
    const OperandText& text = operand("a register");
    if (text.kind != OperandKind::kName) fail("expected a register to write to");
    add_slot(register_named(text.names[0], bits, width));
  }

  void source(int bits, RegisterWidth width = RegisterWidth::kExact) {
    const OperandText& text = operand("a register or number");
    if (text.kind == OperandKind::kNumber && bits != kPredicateBits) {
      add_slot(symbols_.constant(text.number, bits, statement_.line));
    } else if (text.kind == OperandKind::kName) {
      add_slot(register_named(text.names[0], bits, width));
    } else {
      fail("expected a register or number");
    }
  }

  // A number stands there as the bits of a float32: 0f and 8 digits.
  void source_of_float() {
    const bool is_next = next_operand_ < statement_.operands.size();
    if (!is_next || statement_.operands[next_operand_].kind != OperandKind::kNumber) return source(32);
    const std::string& number = operand("a number").number;
    if (number.size() != 10 || number.rfind("0f", 0) != 0) fail("unknown number " + number);
    add_slot(symbols_.constant("0x" + number.substr(2), 32, statement_.line));
  }

  void elements(int bits, size_t count) {
    if (count == 1) fail("a vector needs .v2 or .v4");
    const OperandText& text = operand("a vector");
    if (text.kind != OperandKind::kVector || text.names.size() != count) fail("expected a vector of registers");
    for (const std::string& name : text.names) add_slot(register_named(name, bits, RegisterWidth::kAtLeast));
  }

  const OperandText& address() {
    const OperandText& text = operand("an address");
    if (text.kind != OperandKind::kAddress) fail("expected an address");
    if (!text.number.empty()) {
      instruction_.offset = static_cast<uint64_t>(parse_number(text.number, statement_.line));
    }
    return text;
  }

  void address_register() {
    const OperandText& text = address();
    add_slot(register_named(text.names[0], 64, RegisterWidth::kExact));
  }

  void guard() {
    if (statement_.guard.empty()) return;
    instruction_.guard = register_named(statement_.guard, kPredicateBits, RegisterWidth::kExact);
    instruction_.guard_holds_for = statement_.guard_sense == GuardSense::kTrue ? 1 : 0;
  }

  void finish() const {
    if (next_modifier_ != modifiers_.size()) fail("unknown modifier ." + modifiers_[next_modifier_]);
    if (next_operand_ != statement_.operands.size()) fail("too many operands");
  }

  const Statement& statement_;
  Symbols& symbols_;
  std::vector<std::string> modifiers_;  // the first one is the opcode
  size_t next_modifier_ = 1;
  size_t next_operand_ = 0;
  size_t slots_ = 0;
  Instruction instruction_;
};

}  // namespace simcuda::ptx
