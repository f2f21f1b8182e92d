// PTX's fundamental types, as far as the interpreter knows them, and how to get from one to its C++ type.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace simcuda::ptx {

enum class TypeKind { kUnsigned, kSigned, kBits, kFloat, kPredicate };

struct Type {
  TypeKind kind;
  int bits;
};

// The type that a modifier such as "u32" names.
inline std::optional<Type> type_named(const std::string& name) {
  if (name == "pred") return Type{TypeKind::kPredicate, 1};
  if (name == "f32") return Type{TypeKind::kFloat, 32};
  if (name.size() < 2) return std::nullopt;
  const std::string bits = name.substr(1);
  if (bits != "8" && bits != "16" && bits != "32" && bits != "64") return std::nullopt;
  switch (name[0]) {
    case 'u':
      return Type{TypeKind::kUnsigned, std::stoi(bits)};
    case 's':
      return Type{TypeKind::kSigned, std::stoi(bits)};
    case 'b':
      return Type{TypeKind::kBits, std::stoi(bits)};
    default:
      return std::nullopt;
  }
}

// Calls `function` with a value of the C++ type: bits, and those of floats, count as unsigned.
template <typename Function>
auto with_type(Type type, const Function& function) {
  const bool is_signed = type.kind == TypeKind::kSigned;
  switch (type.bits) {
    case 8:
      return is_signed ? function(int8_t{}) : function(uint8_t{});
    case 16:
      return is_signed ? function(int16_t{}) : function(uint16_t{});
    case 32:
      return is_signed ? function(int32_t{}) : function(uint32_t{});
    case 64:
      return is_signed ? function(int64_t{}) : function(uint64_t{});
    default:
      throw std::logic_error("no C++ type for a predicate");
  }
}

}  // namespace simcuda::ptx
