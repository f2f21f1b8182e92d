#include "ptx/decoder.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "ptx/operations.h"
#include "ptx/statement_reader.h"
#include "ptx/type.h"

namespace simcuda::ptx {

namespace {

// Types that instructions exist for.
constexpr TypeSet kIntegers{"us", 16};
constexpr TypeSet kBitStrings{"b", 16};
constexpr TypeSet kBitStringsOrPredicates{"bp", 16};
constexpr TypeSet kAny{"usb", 16};
constexpr TypeSet kAnyOrPredicates{"usbp", 16};
constexpr TypeSet kInMemory{"usb", 8};
constexpr TypeSet kConvertible{"us", 8};
constexpr TypeSet kFloats{"f", 32};

constexpr int kMaxAccessBits = 128;

class Decoder : StatementReader {
 public:
  using StatementReader::StatementReader;

  Instruction run() {
    static const std::map<std::string, void (Decoder::*)()> kOpcodes{
        {"add", &Decoder::arithmetic_of_floats_too<Add, AddFloats>},
        {"and", &Decoder::logic<And>},
        {"bfi", &Decoder::insertion},
        {"bra", &Decoder::branch_to},
        {"cvt", &Decoder::conversion},
        {"cvta", &Decoder::address_conversion},
        {"div", &Decoder::division<DivisionResult::kQuotient>},
        {"ld", &Decoder::load_from},
        {"mad", &Decoder::multiply_add},
        {"max", &Decoder::arithmetic<Maximum>},
        {"min", &Decoder::arithmetic<Minimum>},
        {"mov", &Decoder::move_to},
        {"mul", &Decoder::multiply},
        {"neg", &Decoder::negate},
        {"not", &Decoder::invert},
        {"or", &Decoder::logic<Or>},
        {"rem", &Decoder::division<DivisionResult::kRemainder>},
        {"ret", &Decoder::return_},
        {"selp", &Decoder::selection},
        {"setp", &Decoder::comparison},
        {"shf", &Decoder::funnel},
        {"shl", &Decoder::shift_to_left},
        {"shr", &Decoder::shift_to_right},
        {"st", &Decoder::store_to},
        {"sub", &Decoder::arithmetic<Subtract>},
        {"xor", &Decoder::logic<Xor>},
    };
    guard();
    const auto opcode = kOpcodes.find(modifiers_[0]);
    if (opcode == kOpcodes.end()) fail("unknown instruction");
    (this->*opcode->second)();
    finish();
    return instruction_;
  }

 private:
  template <typename Function>
  void arithmetic() {
    const Type t = type(kIntegers);
    destination(t.bits);
    source(t.bits);
    source(t.bits);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return binary<Function, decltype(tag)>; });
  }

  template <typename Function, typename OfFloats>
  void arithmetic_of_floats_too() {
    if (modifier() != "rn") return arithmetic<Function>();
    of_floats<OfFloats>();
  }

  // Without a mode of rounding, a device may round a product and a sum together.
  template <typename Function>
  void of_floats() {
    require("rn");
    destination(type(kFloats).bits);
    source_of_float();
    source_of_float();
    instruction_.operation = binary<Function, uint32_t>;
  }

  void insertion() {
    const Type t = type({"b", 32});
    destination(t.bits);
    source(t.bits);
    source(t.bits);
    source(32);
    source(32);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return insert_bits<decltype(tag)>; });
  }

  template <DivisionResult kResult>
  void division() {
    const Type t = type(kIntegers);
    destination(t.bits);
    source(t.bits);
    source(t.bits);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return divide<kResult, decltype(tag)>; });
  }

  void multiply() {
    if (modifier() == "rn") return of_floats<MultiplyFloats>();
    const bool wide = take("wide");
    const bool high = !wide && take("hi");
    if (!wide && !high) require("lo");
    const Type t = type(kIntegers);
    if (wide && t.bits == 64) fail("unknown type or modifier");
    destination(wide ? 2 * t.bits : t.bits);
    source(t.bits);
    source(t.bits);
    instruction_.operation = with_type(t, [&](auto tag) -> Operation {
      using T = decltype(tag);
      if (wide) return multiply_wide<T>;
      return high ? binary<MultiplyHigh, T> : binary<MultiplyLow, T>;
    });
  }

  void multiply_add() {
    const bool wide = take("wide");
    if (!wide) require("lo");
    const Type t = type(kIntegers);
    if (wide && t.bits == 64) fail("unknown type or modifier");
    const int result_bits = wide ? 2 * t.bits : t.bits;
    destination(result_bits);
    source(t.bits);
    source(t.bits);
    source(result_bits);
    instruction_.operation = with_type(t, [&](auto tag) -> Operation {
      return wide ? multiply_add_wide<decltype(tag)> : multiply_add_low<decltype(tag)>;
    });
  }

  template <typename Function>
  void logic() {
    const Type t = type(kBitStringsOrPredicates);
    destination(t.bits);
    source(t.bits);
    source(t.bits);
    instruction_.operation = t.kind == TypeKind::kPredicate
                                 ? binary<Function, bool>
                                 : with_type(t, [](auto tag) -> Operation { return binary<Function, decltype(tag)>; });
  }

  void invert() {
    const Type t = type(kBitStringsOrPredicates);
    destination(t.bits);
    source(t.bits);
    instruction_.operation = t.kind == TypeKind::kPredicate
                                 ? not_predicate
                                 : with_type(t, [](auto tag) -> Operation { return unary<Not, decltype(tag)>; });
  }

  void negate() {
    const Type t = type({"s", 16});
    destination(t.bits);
    source(t.bits);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return unary<Negate, decltype(tag)>; });
  }

  void shift_to_left() {
    const Type t = type(kBitStrings);
    destination(t.bits);
    source(t.bits);
    source(32);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return shift_left<decltype(tag)>; });
  }

  void shift_to_right() {
    const Type t = type(kAny);
    destination(t.bits);
    source(t.bits);
    source(32);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return shift_right<decltype(tag)>; });
  }

  void funnel() {
    const bool left = take("l");
    if (!left) require("r");
    const bool wrap = take("wrap");
    if (!wrap) require("clamp");
    require("b32");
    destination(32);
    source(32);
    source(32);
    source(32);
    using Direction = FunnelDirection;
    using Amount = FunnelAmount;
    if (left) {
      instruction_.operation =
          wrap ? funnel_shift<Direction::kLeft, Amount::kWrap> : funnel_shift<Direction::kLeft, Amount::kClamp>;
    } else {
      instruction_.operation =
          wrap ? funnel_shift<Direction::kRight, Amount::kWrap> : funnel_shift<Direction::kRight, Amount::kClamp>;
    }
  }

  void comparison() {
    const std::string name = modifier();
    ++next_modifier_;
    const bool only_equality = name == "eq" || name == "ne";
    const Type t = type(only_equality ? kAny : kIntegers);
    destination(kPredicateBits);
    source(t.bits);
    source(t.bits);
    instruction_.operation = with_type(t, [&](auto tag) -> Operation {
      using T = decltype(tag);
      if (name == "eq") return compare<Equal, T>;
      if (name == "ne") return compare<NotEqual, T>;
      if (name == "lt") return compare<Less, T>;
      if (name == "le") return compare<LessOrEqual, T>;
      if (name == "gt") return compare<Greater, T>;
      if (name == "ge") return compare<GreaterOrEqual, T>;
      fail("unknown comparison ." + name);
    });
  }

  void selection() {
    const Type t = type(kAny);
    destination(t.bits);
    source(t.bits);
    source(t.bits);
    source(kPredicateBits);
    instruction_.operation = with_type(t, [](auto tag) -> Operation { return select<decltype(tag)>; });
  }

  void move_to() {
    const Type t = type(kAnyOrPredicates);
    destination(t.bits);
    const bool from_special = next_operand_ < statement_.operands.size() &&
                              statement_.operands[next_operand_].kind == OperandKind::kName &&
                              Symbols::find_special_register(statement_.operands[next_operand_].names[0]) != kNoSlot;
    if (from_special) {
      if (t.bits != 32) fail("special registers have 32 bits");
      add_slot(Symbols::find_special_register(operand("a special register").names[0]));
    } else {
      source(t.bits);
    }
    instruction_.operation = t.kind == TypeKind::kPredicate
                                 ? move<bool>
                                 : with_type(t, [](auto tag) -> Operation { return move<decltype(tag)>; });
  }

  void conversion() {
    if (take("rn")) {
      const Type to = type(kFloats);
      const Type from = type(kConvertible);
      destination(to.bits);
      source(from.bits, RegisterWidth::kAtLeast);
      instruction_.operation = with_type(from, [](auto tag) -> Operation { return convert_to_float<decltype(tag)>; });
      return;
    }
    const Type to = type(kConvertible);
    const Type from = type(kConvertible);
    destination(to.bits, RegisterWidth::kAtLeast);
    source(from.bits, RegisterWidth::kAtLeast);
    instruction_.operation = with_type(to, [&](auto to_tag) -> Operation {
      return with_type(from, [](auto from_tag) -> Operation { return convert<decltype(to_tag), decltype(from_tag)>; });
    });
  }

  // Global addresses are generic ones, so that there is nothing to convert.
  void address_conversion() {
    take("to");
    require("global");
    require("u64");
    destination(64);
    source(64);
    instruction_.operation = move<uint64_t>;
  }

  size_t take_vector() {
    if (take("v2")) return 2;
    return take("v4") ? 4 : 1;
  }

  void load_from() {
    if (take("param")) return load_from_parameter();
    const bool global = take("global");
    take_any({"ca", "cg", "cs", "lu", "cv"});
    if (global) take("nc");
    const size_t count = take_vector();
    const Type t = type(kInMemory);
    if (t.bits * static_cast<int>(count) > kMaxAccessBits) fail("no access is that wide");
    if (count == 1) {
      destination(t.bits, RegisterWidth::kAtLeast);
    } else {
      elements(t.bits, count);
    }
    address_register();
    instruction_.operation = with_type(t, [&](auto tag) -> Operation {
      using T = decltype(tag);
      if (count == 1) return load<T, 1>;
      return count == 2 ? load<T, 2> : load<T, 4>;
    });
  }

  void load_from_parameter() {
    const size_t count = take_vector();
    const Type t = type(kInMemory);
    const auto bytes = count * static_cast<size_t>(t.bits / 8);
    if (8 * bytes > kMaxAccessBits) fail("no access is that wide");
    if (count == 1) {
      destination(t.bits, RegisterWidth::kAtLeast);
    } else {
      elements(t.bits, count);
    }
    const OperandText& text = address();
    const Parameter& parameter = symbols_.find_parameter(text.names[0], statement_.line);
    if (instruction_.offset > parameter.size || parameter.size - instruction_.offset < bytes) {
      fail("reads past parameter " + parameter.name);
    }
    instruction_.offset += parameter.offset;
    if (instruction_.offset % bytes != 0) fail("misaligned parameter");
    instruction_.operation = with_type(t, [&](auto tag) -> Operation {
      using T = decltype(tag);
      if (count == 1) return load_parameter<T, 1>;
      return count == 2 ? load_parameter<T, 2> : load_parameter<T, 4>;
    });
  }

  void store_to() {
    take("global");
    take_any({"wb", "cg", "cs", "wt"});
    const size_t count = take_vector();
    const Type t = type(kInMemory);
    if (t.bits * static_cast<int>(count) > kMaxAccessBits) fail("no access is that wide");
    address_register();
    if (count == 1) {
      source(t.bits, RegisterWidth::kAtLeast);
    } else {
      elements(t.bits, count);
    }
    instruction_.operation = with_type(t, [&](auto tag) -> Operation {
      using T = decltype(tag);
      if (count == 1) return store<T, 1>;
      return count == 2 ? store<T, 2> : store<T, 4>;
    });
  }

  void branch_to() {
    take("uni");
    const OperandText& text = operand("a label");
    if (text.kind != OperandKind::kName) fail("expected a label");
    instruction_.target = symbols_.find_label(text.names[0], statement_.line);
    instruction_.operation = branch;
  }

  void return_() {
    take("uni");
    instruction_.operation = return_from;
  }
};

}  // namespace

Instruction decode(const Statement& statement, Symbols& symbols) { return Decoder(statement, symbols).run(); }

}  // namespace simcuda::ptx
