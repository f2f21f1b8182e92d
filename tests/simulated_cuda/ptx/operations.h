// What each instruction does, in C++. Types follow PTX: .u and .b are unsigned, .s are signed. A slot holds the value
// extended to 64 bits as its type says, and every reading looks only at the bits of the type that it reads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "ptx/lexer.h"
#include "ptx/program.h"

namespace simcuda::ptx {

template <typename T>
constexpr unsigned kBits = std::numeric_limits<std::make_unsigned_t<T>>::digits;

template <typename T>
T read(const Instruction& instruction, const Thread& thread, size_t operand) {
  const Slot slot = instruction.operands[operand];
  if (thread.written_by[slot] < thread.number)
    throw error_at(instruction.line, "reads a register before it is written");
  return static_cast<T>(thread.values[slot]);
}

inline bool read_predicate(const Instruction& instruction, const Thread& thread, size_t operand) {
  return read<uint64_t>(instruction, thread, operand) != 0;
}

inline void write_bits(const Instruction& instruction, Thread& thread, size_t operand, uint64_t bits) {
  const Slot slot = instruction.operands[operand];
  thread.values[slot] = bits;
  thread.written_by[slot] = thread.number;
}

template <typename T>
void write(const Instruction& instruction, Thread& thread, size_t operand, T value) {
  write_bits(instruction, thread, operand, static_cast<uint64_t>(value));
}

// Arithmetic wraps around: done in 64 unsigned bits, of which the type's are kept.
struct Add {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  }
};

struct Subtract {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
  }
};

struct MultiplyLow {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};

struct MultiplyHigh {
  template <typename T>
  static T apply(T a, T b) {
    __extension__ using Product = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>((static_cast<Product>(a) * static_cast<Product>(b)) >> kBits<T>);
  }
};

// Numbers of float32, as bits. The host rounds as PTX's .rn does, and keeps subnormal numbers, as PTX does without
// .ftz.
inline float float_of(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// NaNs have these bits on every device.
inline uint32_t bits_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0x7fffffff : bits;
}

struct AddFloats {
  template <typename T>
  static T apply(T a, T b) {
    return bits_of(float_of(a) + float_of(b));
  }
};

struct MultiplyFloats {
  template <typename T>
  static T apply(T a, T b) {
    return bits_of(float_of(a) * float_of(b));
  }
};

struct Minimum {
  template <typename T>
  static T apply(T a, T b) {
    return std::min(a, b);
  }
};

struct Maximum {
  template <typename T>
  static T apply(T a, T b) {
    return std::max(a, b);
  }
};

struct And {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};

struct Or {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};

struct Xor {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

struct Not {
  template <typename T>
  static T apply(T a) {
    return static_cast<T>(~a);
  }
};

struct Negate {
  template <typename T>
  static T apply(T a) {
    return static_cast<T>(uint64_t{0} - static_cast<uint64_t>(a));
  }
};

struct Equal {
  template <typename T>
  static bool apply(T a, T b) {
    return a == b;
  }
};

struct NotEqual {
  template <typename T>
  static bool apply(T a, T b) {
    return a != b;
  }
};

struct Less {
  template <typename T>
  static bool apply(T a, T b) {
    return a < b;
  }
};

struct LessOrEqual {
  template <typename T>
  static bool apply(T a, T b) {
    return a <= b;
  }
};

struct Greater {
  template <typename T>
  static bool apply(T a, T b) {
    return a > b;
  }
};

struct GreaterOrEqual {
  template <typename T>
  static bool apply(T a, T b) {
    return a >= b;
  }
};

template <typename Function, typename T>
void unary(const Instruction& instruction, Thread& thread) {
  write<T>(instruction, thread, 0, Function::template apply<T>(read<T>(instruction, thread, 1)));
}

// With T = bool for predicates.
template <typename Function, typename T>
void binary(const Instruction& instruction, Thread& thread) {
  const T a = read<T>(instruction, thread, 1);
  write<T>(instruction, thread, 0, Function::template apply<T>(a, read<T>(instruction, thread, 2)));
}

template <typename Comparison, typename T>
void compare(const Instruction& instruction, Thread& thread) {
  const T a = read<T>(instruction, thread, 1);
  write<uint64_t>(instruction, thread, 0, Comparison::template apply<T>(a, read<T>(instruction, thread, 2)) ? 1 : 0);
}

inline void not_predicate(const Instruction& instruction, Thread& thread) {
  write<uint64_t>(instruction, thread, 0, read_predicate(instruction, thread, 1) ? 0 : 1);
}

template <typename T>
void move(const Instruction& instruction, Thread& thread) {
  write<T>(instruction, thread, 0, read<T>(instruction, thread, 1));
}

template <typename T>
void select(const Instruction& instruction, Thread& thread) {
  const T a = read<T>(instruction, thread, 1);
  const T b = read<T>(instruction, thread, 2);
  write<T>(instruction, thread, 0, read_predicate(instruction, thread, 3) ? a : b);
}

template <typename T>
void multiply_add_low(const Instruction& instruction, Thread& thread) {
  const T product = MultiplyLow::apply<T>(read<T>(instruction, thread, 1), read<T>(instruction, thread, 2));
  write<T>(instruction, thread, 0, Add::apply<T>(product, read<T>(instruction, thread, 3)));
}

// 16 bits times 16 bits are 32, and 32 bits times 32 bits are 64.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

template <typename T>
Wide<T> product(const Instruction& instruction, Thread& thread) {
  const Wide<T> a = read<T>(instruction, thread, 1);
  return MultiplyLow::apply<Wide<T>>(a, read<T>(instruction, thread, 2));
}

template <typename T>
void multiply_wide(const Instruction& instruction, Thread& thread) {
  write<Wide<T>>(instruction, thread, 0, product<T>(instruction, thread));
}

template <typename T>
void multiply_add_wide(const Instruction& instruction, Thread& thread) {
  const auto sum = Add::apply<Wide<T>>(product<T>(instruction, thread), read<Wide<T>>(instruction, thread, 3));
  write<Wide<T>>(instruction, thread, 0, sum);
}

enum class DivisionResult { kQuotient, kRemainder };

// The one quotient that does not fit wraps around, instead of ending the host's process.
template <DivisionResult kResult, typename T>
void divide(const Instruction& instruction, Thread& thread) {
  const T a = read<T>(instruction, thread, 1);
  const T b = read<T>(instruction, thread, 2);
  if (b == 0) throw error_at(instruction.line, "divides by zero");
  const bool by_minus_one = std::is_signed_v<T> && b == static_cast<T>(-1);
  if constexpr (kResult == DivisionResult::kQuotient) {
    write<T>(instruction, thread, 0, by_minus_one ? Negate::apply<T>(a) : static_cast<T>(a / b));
  } else {
    write<T>(instruction, thread, 0, by_minus_one ? T{0} : static_cast<T>(a % b));
  }
}

// Shifts by as many bits as the type has, or more, leave nothing but the sign.
template <typename T>
void shift_left(const Instruction& instruction, Thread& thread) {
  const T value = read<T>(instruction, thread, 1);
  const uint32_t by = read<uint32_t>(instruction, thread, 2);
  write<T>(instruction, thread, 0, by < kBits<T> ? static_cast<T>(static_cast<uint64_t>(value) << by) : T{0});
}

template <typename T>
void shift_right(const Instruction& instruction, Thread& thread) {
  const T value = read<T>(instruction, thread, 1);
  const uint32_t by = read<uint32_t>(instruction, thread, 2);
  const T rest = std::is_signed_v<T> && value < T{0} ? static_cast<T>(-1) : T{0};
  write<T>(instruction, thread, 0, by < kBits<T> ? static_cast<T>(value >> by) : rest);
}

enum class FunnelDirection { kLeft, kRight };
enum class FunnelAmount { kWrap, kClamp };

// Shifts the 64 bits of two registers, the first one being the low half, and keeps one half.
template <FunnelDirection kDirection, FunnelAmount kAmount>
void funnel_shift(const Instruction& instruction, Thread& thread) {
  const uint64_t low = read<uint32_t>(instruction, thread, 1);
  const uint64_t both = low | uint64_t{read<uint32_t>(instruction, thread, 2)} << 32;
  const uint32_t amount = read<uint32_t>(instruction, thread, 3);
  const uint32_t by = kAmount == FunnelAmount::kWrap ? amount & 31 : std::min(amount, uint32_t{32});
  const uint64_t shifted = kDirection == FunnelDirection::kLeft ? (both << by) >> 32 : both >> by;
  write<uint32_t>(instruction, thread, 0, static_cast<uint32_t>(shifted));
}

// Puts the lowest bits of one register in the place of some of another.
template <typename T>
void insert_bits(const Instruction& instruction, Thread& thread) {
  const auto bits = static_cast<uint64_t>(read<T>(instruction, thread, 1));
  const auto rest = static_cast<uint64_t>(read<T>(instruction, thread, 2));
  const uint32_t position = read<uint32_t>(instruction, thread, 3) & 0xff;
  const uint32_t length = std::min<uint32_t>(read<uint32_t>(instruction, thread, 4) & 0xff, kBits<T>);
  if (position >= kBits<T>) return write<T>(instruction, thread, 0, static_cast<T>(rest));
  const uint64_t ones = length == 64 ? ~uint64_t{0} : (uint64_t{1} << length) - 1;
  const uint64_t mask = ones << position;
  write<T>(instruction, thread, 0, static_cast<T>((rest & ~mask) | (bits << position & mask)));
}

template <typename From>
void convert_to_float(const Instruction& instruction, Thread& thread) {
  write<uint32_t>(instruction, thread, 0, bits_of(static_cast<float>(read<From>(instruction, thread, 1))));
}

template <typename To, typename From>
void convert(const Instruction& instruction, Thread& thread) {
  write<To>(instruction, thread, 0, static_cast<To>(read<From>(instruction, thread, 1)));
}

// The host's address of what a load or store touches; `operand` holds the device's.
inline std::byte* access(const Instruction& instruction, Thread& thread, size_t operand, size_t bytes, bool write) {
  const uint64_t address = read<uint64_t>(instruction, thread, operand) + instruction.offset;
  if (address % bytes != 0) {
    throw misaligned_access("PTX line " + std::to_string(instruction.line) + ": misaligned access of " +
                            std::to_string(bytes) + " bytes at " + std::to_string(address));
  }
  return thread.memory->access(address, bytes, write);
}

template <typename T>
void load_elements(const Instruction& instruction, Thread& thread, const std::byte* from, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    write<T>(instruction, thread, i, value);
  }
}

template <typename T, size_t kCount>
void load(const Instruction& instruction, Thread& thread) {
  load_elements<T>(instruction, thread, access(instruction, thread, kCount, kCount * sizeof(T), false), kCount);
}

template <typename T, size_t kCount>
void load_parameter(const Instruction& instruction, Thread& thread) {
  load_elements<T>(instruction, thread, thread.parameters->data() + instruction.offset, kCount);
}

template <typename T, size_t kCount>
void store(const Instruction& instruction, Thread& thread) {
  std::byte* to = access(instruction, thread, 0, kCount * sizeof(T), true);
  for (size_t i = 0; i < kCount; ++i) {
    const T value = read<T>(instruction, thread, 1 + i);
    std::memcpy(to + i * sizeof(T), &value, sizeof(T));
  }
}

inline void branch(const Instruction& instruction, Thread& thread) { thread.next = instruction.target; }

constexpr uint32_t kReturned = kNoTarget;

inline void return_from(const Instruction& /*instruction*/, Thread& thread) { thread.next = kReturned; }

}  // namespace simcuda::ptx
