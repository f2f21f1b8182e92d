// Each form of each instruction against what C++ makes of it in wider integers.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "doctest/doctest.h"
#include "instruction_kernel.h"
#include "random.h"

using dcp_fast::testing::Random;
using simcuda::testing::InstructionKernel;

namespace {

__extension__ using Integer = __int128;

struct Type {
  char kind;
  int bits;
  std::string name() const { return kind + std::to_string(bits); }
  // The value of these bits.
  Integer value(uint64_t raw) const {
    const Integer modulus = Integer{1} << bits;
    const Integer value = raw & static_cast<uint64_t>(modulus - 1);
    return kind == 's' && value >= modulus / 2 ? value - modulus : value;
  }
  uint64_t raw(Integer value) const {
    return static_cast<uint64_t>(value) & static_cast<uint64_t>((Integer{1} << bits) - 1);
  }
};

const std::vector<Type> kIntegers{{'u', 16}, {'s', 16}, {'u', 32}, {'s', 32}, {'u', 64}, {'s', 64}};
const std::vector<Type> kBitStrings{{'b', 16}, {'b', 32}, {'b', 64}};

std::vector<Type> all_types() {
  std::vector<Type> types = kIntegers;
  types.insert(types.end(), kBitStrings.begin(), kBitStrings.end());
  return types;
}

// Where errors live, and anything.
uint64_t operand(Random& random, int bits) {
  const uint64_t top = uint64_t{1} << (bits - 1);
  const uint64_t anything = uint64_t{random.below(size_t{1} << 32)} << 32 | random.below(size_t{1} << 32);
  return random.pick<uint64_t>(
      {0, 1, 2, 3, ~uint64_t{0}, top, top - 1, top + 1, 31, 32, 33, anything, anything, anything});
}

using Reference = std::function<Integer(Integer, Integer, Integer)>;

// The registers' and the operands' types, the result's first, and what the result's should be.
void check(const std::string& instruction, const std::vector<Type>& types, const Reference& reference) {
  CAPTURE(instruction);
  std::vector<int> bits;
  for (const Type& type : types) bits.push_back(type.bits);
  const InstructionKernel kernel(instruction, bits);
  Random random(7);
  for (int i = 0; i < 300; ++i) {
    std::vector<uint64_t> raw(3);
    std::vector<Integer> values(3);
    for (size_t k = 1; k < types.size(); ++k) {
      raw[k - 1] = types[k].bits == 1 ? random.below(2) : operand(random, types[k].bits);
      values[k - 1] = types[k].value(raw[k - 1]);
    }
    CAPTURE(raw);
    REQUIRE(kernel(raw[0], raw[1], raw[2]) == types[0].raw(reference(values[0], values[1], values[2])));
  }
}

void check_binary(const std::string& mnemonic, const Type& type, const Reference& reference) {
  check(mnemonic + "." + type.name() + " %d, %a, %b;", {type, type, type}, reference);
}

// Division by zero has a test of its own.
Integer or_one(Integer value) { return value == 0 ? 1 : value; }

const Type kPredicate{'p', 1};
const Type kAmount{'u', 32};

}  // namespace

TEST_CASE("ptx: integer arithmetic") {
  for (const Type& type : kIntegers) {
    check_binary("add", type, [](Integer a, Integer b, Integer) { return a + b; });
    check_binary("sub", type, [](Integer a, Integer b, Integer) { return a - b; });
    check_binary("min", type, [](Integer a, Integer b, Integer) { return a < b ? a : b; });
    check_binary("max", type, [](Integer a, Integer b, Integer) { return a > b ? a : b; });
    // Wraps around, as the product of two unsigned 64-bit numbers and a third one added do not fit.
    const auto product = [](Integer a, Integer b, Integer c) {
      __extension__ using Unsigned = unsigned __int128;
      return static_cast<Integer>(static_cast<Unsigned>(a) * static_cast<Unsigned>(b) + static_cast<Unsigned>(c));
    };
    const int bits = type.bits;
    check_binary("mul.lo", type, [&](Integer a, Integer b, Integer) { return product(a, b, 0); });
    check_binary("mul.hi", type, [&](Integer a, Integer b, Integer) { return product(a, b, 0) >> bits; });
    check("mad.lo." + type.name() + " %d, %a, %b, %c;", {type, type, type, type},
          [&](Integer a, Integer b, Integer c) { return product(a, b, c); });
    if (bits == 64) continue;
    const Type wide{type.kind, 2 * bits};
    check("mul.wide." + type.name() + " %d, %a, %b;", {wide, type, type},
          [](Integer a, Integer b, Integer) { return a * b; });
    check("mad.wide." + type.name() + " %d, %a, %b, %c;", {wide, type, type, wide},
          [](Integer a, Integer b, Integer c) { return a * b + c; });
  }
}

TEST_CASE("ptx: division and remainder") {
  for (const Type& type : kIntegers) {
    const std::string t = type.name();
    const std::string never_zero = "max.u" + std::to_string(type.bits) + " %b, %b, 1;\n";
    check(never_zero + "div." + t + " %d, %a, %b;", {type, type, type},
          [](Integer a, Integer b, Integer) { return a / or_one(b); });
    check(never_zero + "rem." + t + " %d, %a, %b;", {type, type, type},
          [](Integer a, Integer b, Integer) { return a % or_one(b); });
    const InstructionKernel kernel("div." + t + " %d, %a, %b;", {type.bits, type.bits, type.bits});
    CHECK_THROWS_WITH(kernel(1, 0), doctest::Contains("divides by zero"));
  }
}

TEST_CASE("ptx: negation and logic") {
  for (const Type& type : kIntegers) {
    if (type.kind == 'u') continue;
    check("neg." + type.name() + " %d, %a;", {type, type}, [](Integer a, Integer, Integer) { return -a; });
  }
  for (const Type& type : {Type{'b', 16}, Type{'b', 32}, Type{'b', 64}, kPredicate}) {
    const std::string t = type.bits == 1 ? "pred" : type.name();
    const auto three = [&](const std::string& opcode) { return opcode + "." + t + " %d, %a, %b;"; };
    check(three("and"), {type, type, type}, [](Integer a, Integer b, Integer) { return a & b; });
    check(three("or"), {type, type, type}, [](Integer a, Integer b, Integer) { return a | b; });
    check(three("xor"), {type, type, type}, [](Integer a, Integer b, Integer) { return a ^ b; });
    check("not." + t + " %d, %a;", {type, type}, [](Integer a, Integer, Integer) { return ~a; });
    check("mov." + t + " %d, %a;", {type, type}, [](Integer a, Integer, Integer) { return a; });
  }
}

TEST_CASE("ptx: shifts") {
  const auto shifted = [](Integer a, Integer by) { return by > 64 ? (a < 0 ? Integer{-1} : Integer{0}) : a >> by; };
  for (const Type& type : all_types()) {
    check("shr." + type.name() + " %d, %a, %b;", {type, type, kAmount},
          [&](Integer a, Integer b, Integer) { return shifted(a, b); });
    if (type.kind != 'b') continue;
    check("shl." + type.name() + " %d, %a, %b;", {type, type, kAmount}, [](Integer a, Integer b, Integer) {
      return b > 63 ? Integer{0} : static_cast<Integer>(static_cast<uint64_t>(a) << b);
    });
  }
  const Type word{'b', 32};
  const std::vector<Type> types{word, word, word, kAmount};
  const auto both = [](Integer low, Integer high) { return low | high << 32; };
  const auto clamped = [](Integer by) { return by > 32 ? Integer{32} : by; };
  check("shf.l.wrap.b32 %d, %a, %b, %c;", types,
        [&](Integer a, Integer b, Integer c) { return (both(a, b) << (c & 31)) >> 32; });
  check("shf.r.wrap.b32 %d, %a, %b, %c;", types,
        [&](Integer a, Integer b, Integer c) { return both(a, b) >> (c & 31); });
  check("shf.l.clamp.b32 %d, %a, %b, %c;", types,
        [&](Integer a, Integer b, Integer c) { return (both(a, b) << clamped(c)) >> 32; });
  check("shf.r.clamp.b32 %d, %a, %b, %c;", types,
        [&](Integer a, Integer b, Integer c) { return both(a, b) >> clamped(c); });
}

TEST_CASE("ptx: comparisons and selection") {
  for (const Type& type : all_types()) {
    const auto compare = [&](const std::string& how, const Reference& reference) {
      check("setp." + how + "." + type.name() + " %d, %a, %b;", {kPredicate, type, type}, reference);
      check("setp." + how + "." + type.name() + " %d, %a, %a;", {kPredicate, type},
            [&](Integer a, Integer, Integer) { return reference(a, a, 0); });
    };
    compare("eq", [](Integer a, Integer b, Integer) { return a == b; });
    compare("ne", [](Integer a, Integer b, Integer) { return a != b; });
    check("selp." + type.name() + " %d, %a, %b, %c;", {type, type, type, kPredicate},
          [](Integer a, Integer b, Integer c) { return c != 0 ? a : b; });
    check("mov." + type.name() + " %d, %a;", {type, type}, [](Integer a, Integer, Integer) { return a; });
    if (type.kind == 'b') continue;
    compare("lt", [](Integer a, Integer b, Integer) { return a < b; });
    compare("le", [](Integer a, Integer b, Integer) { return a <= b; });
    compare("gt", [](Integer a, Integer b, Integer) { return a > b; });
    compare("ge", [](Integer a, Integer b, Integer) { return a >= b; });
  }
}

TEST_CASE("ptx: conversions") {
  std::vector<Type> types = kIntegers;
  types.push_back({'u', 8});
  types.push_back({'s', 8});
  for (const Type& to : types) {
    for (const Type& from : types) {
      // Registers may be wider, and the narrowest that there are have 16 bits; the result fills them.
      const Type wide_to{to.kind, 64};
      check("cvt." + to.name() + "." + from.name() + " %d, %a;", {wide_to, {'b', 64}},
            [&](Integer a, Integer, Integer) { return to.value(to.raw(from.value(from.raw(a)))); });
    }
  }
  const Type address{'u', 64};
  for (const char* mnemonic : {"cvta.global.u64", "cvta.to.global.u64"}) {
    check(mnemonic + std::string(" %d, %a;"), {address, address}, [](Integer a, Integer, Integer) { return a; });
  }
}

TEST_CASE("ptx: bits that are put among others") {
  const std::vector<Type> types{{'b', 32}, {'b', 32}, {'b', 32}, kAmount};
  for (const int length : {0, 1, 7, 31, 32, 200}) {
    check("bfi.b32 %d, %a, %b, %c, " + std::to_string(length) + ";", types, [&](Integer a, Integer b, Integer c) {
      const Integer position = c & 255;
      if (position > 31) return b;
      const Integer mask = ((Integer{1} << std::min(length, 32)) - 1) << position;
      return (b & ~mask) | (a << position & mask);
    });
  }
  CHECK(InstructionKernel("bfi.b64 %d, %a, %b, 8, 40;", {64, 64, 64})(~uint64_t{0}, 0) == 0xFFFFFFFFFF00);
}

TEST_CASE("ptx: floats are rounded to nearest, and subnormal ones stay what they are") {
  const InstructionKernel product("mul.rn.f32 %d, %a, %b;", {32, 32, 32});
  const InstructionKernel sum("add.rn.f32 %d, %a, %b;", {32, 32, 32});
  const auto bits = [](float value) {
    uint32_t result = 0;
    std::memcpy(&result, &value, sizeof(result));
    return result;
  };
  CHECK(product(bits(1.5F), bits(-3)) == bits(-4.5F));
  CHECK(product(bits(1 + 0x1p-23F), bits(1 + 0x1p-23F)) == bits(1 + 0x1p-22F));
  CHECK(product(1, bits(2)) == 2);
  CHECK(product(3, bits(0.5F)) == 2);  // a tie, to even
  CHECK(product(bits(1e30F), bits(1e30F)) == 0x7f800000);
  CHECK(product(0x7f800000, 0) == 0x7fffffff);
  CHECK(product(0x7fc12345, bits(1)) == 0x7fffffff);
  CHECK(sum(bits(1), bits(0x1p-24F)) == bits(1));
  CHECK(sum(bits(0x1p23F), bits(1.5F)) == bits(0x1p23F + 2));
  CHECK(sum(1, 2) == 3);
  CHECK(InstructionKernel("mul.rn.f32 %d, %a, 0f40400000;", {32, 32})(bits(2)) == bits(6));
  CHECK(InstructionKernel("cvt.rn.f32.u16 %d, %a;", {32, 16})(65535) == bits(65535));
  CHECK(InstructionKernel("cvt.rn.f32.s32 %d, %a;", {32, 32})(0xFFFFFFFD) == bits(-3));
  CHECK(InstructionKernel("cvt.rn.f32.u32 %d, %a;", {32, 32})(0x1000001) == bits(0x1p24F));
}

TEST_CASE("ptx: vectors of a parameter") {
  const std::string both = ".reg .b32 %x; .reg .b32 %y;\nld.param.v2.u32 {%x, %y}, [b];\n";
  CHECK(InstructionKernel(both + "mov.u32 %d, %x;", {32, 0, 64})(0, 0x500000003) == 3);
  CHECK(InstructionKernel(both + "mov.u32 %d, %y;", {32, 0, 64})(0, 0x500000003) == 5);
}

TEST_CASE("ptx: numbers for operands") {
  CHECK(InstructionKernel("add.s32 %d, %a, -5;", {32, 32})(3) == 0xFFFFFFFE);
  CHECK(InstructionKernel("mov.u64 %d, 0xFFFFFFFFFFFFFFFF;", {64})(0) == ~uint64_t{0});
  CHECK(InstructionKernel("mov.u64 %d, 18446744073709551615;", {64})(0) == ~uint64_t{0});
  CHECK(InstructionKernel("mov.u16 %d, 65535;", {16})(0) == 65535);
  CHECK(InstructionKernel("mov.s16 %d, -32768;", {16})(0) == 32768);
  CHECK(InstructionKernel("sub.u32 %d, 7, %a;", {32, 32})(3) == 4);
}

TEST_CASE("ptx: guards, branches and loops") {
  CHECK(InstructionKernel("mov.u32 %d, 1;\n@%a mov.u32 %d, 2;\n@!%a mov.u32 %d, 3;", {32, 1})(1) == 2);
  CHECK(InstructionKernel("mov.u32 %d, 1;\n@%a mov.u32 %d, 2;\n@!%a mov.u32 %d, 3;", {32, 1})(0) == 3);
  const InstructionKernel sum(
      "mov.u32 %d, 0;\n.reg .pred %more;\n"
      "$again: add.u32 %d, %d, %a;\nsub.u32 %a, %a, 1;\nsetp.ne.u32 %more, %a, 0;\n@%more bra $again;\n"
      "bra.uni $end;\nmov.u32 %d, 0;\n$end:",
      {32, 32});
  CHECK(sum(100) == 5050);
}
