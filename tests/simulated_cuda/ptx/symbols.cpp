#include "ptx/symbols.h"

#include <array>
#include <cstddef>
#include <cstdlib>

#include "ptx/lexer.h"

namespace simcuda::ptx {

namespace {

template <typename Map>
const typename Map::mapped_type& look_up(const Map& map, const std::string& name, const char* what, int line) {
  const auto found = map.find(name);
  if (found == map.end()) throw error_at(line, "unknown " + std::string(what) + " " + name);
  return found->second;
}

}  // namespace

int64_t parse_number(const std::string& text, int line) {
  const bool negative = text[0] == '-';
  const char* digits = text.c_str() + (negative ? 1 : 0);
  // A leading zero would make it octal.
  const bool hexadecimal = digits[0] == '0' && (digits[1] == 'x' || digits[1] == 'X');
  if (digits[0] == '0' && digits[1] != '\0' && !hexadecimal) throw error_at(line, "unknown number " + text);
  char* end = nullptr;
  const uint64_t value = std::strtoull(digits, &end, hexadecimal ? 16 : 10);
  if (*end != '\0') throw error_at(line, "unknown number " + text);
  return static_cast<int64_t>(negative ? uint64_t{0} - value : value);
}

Symbols::Symbols(Program& program) : program_(program) {
  for (size_t i = 0; i < kSpecialRegisters; ++i) new_slot(0, true);
}

Slot Symbols::new_slot(uint64_t value, bool always_defined) {
  program_.initial_values.push_back(value);
  program_.always_defined.push_back(always_defined);
  return static_cast<Slot>(program_.initial_values.size() - 1);
}

void Symbols::declare_register(const std::string& name, int bits, int line) {
  if (registers_.count(name) != 0) throw error_at(line, "register " + name + " is declared twice");
  registers_[name] = {new_slot(0, false), bits};
}

void Symbols::declare_label(const std::string& name, uint32_t target, int line) {
  if (!labels_.emplace(name, target).second) throw error_at(line, "label " + name + " is declared twice");
}

const Register& Symbols::find_register(const std::string& name, int line) const {
  return look_up(registers_, name, "register", line);
}

uint32_t Symbols::find_label(const std::string& name, int line) const { return look_up(labels_, name, "label", line); }

const Parameter& Symbols::find_parameter(const std::string& name, int line) const {
  for (const Parameter& parameter : program_.parameters) {
    if (parameter.name == name) return parameter;
  }
  throw error_at(line, "unknown parameter " + name);
}

Slot Symbols::find_special_register(const std::string& name) {
  static constexpr std::array<const char*, kSpecialRegisters> kNames{"%tid.x",   "%tid.y",    "%tid.z",    "%ntid.x",
                                                                     "%ntid.y",  "%ntid.z",   "%ctaid.x",  "%ctaid.y",
                                                                     "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<Slot>(i);
  }
  return kNoSlot;
}

Slot Symbols::constant(const std::string& number, int bits, int line) {
  const int64_t value = parse_number(number, line);
  if (bits < 64 && (value < -(int64_t{1} << (bits - 1)) || value >= int64_t{1} << bits)) {
    throw error_at(line, number + " does not fit " + std::to_string(bits) + " bits");
  }
  const auto [known, added] = constants_.emplace(static_cast<uint64_t>(value), kNoSlot);
  if (added) known->second = new_slot(static_cast<uint64_t>(value), true);
  return known->second;
}

}  // namespace simcuda::ptx
