#include "mutants.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <regex>
#include <sstream>
#include <utility>

namespace simcuda::testing {

namespace {

struct Substitution {
  const char* pattern;  // what to find in a mnemonic
  const char* replacement;
};

constexpr Substitution kInMnemonics[] = {
    // opcodes
    {"^add\\.", "sub."},
    {"^sub\\.", "add."},
    {"^mul\\.lo\\.", "add."},
    {"^div\\.", "rem."},
    {"^min\\.", "max."},
    {"^and\\.", "or."},
    {"^shl\\.", "shr."},
    {"^shf\\.l", "shf.r"},
    // comparisons
    {"^setp\\.eq", "setp.ne"},
    {"^setp\\.ne", "setp.eq"},
    {"^setp\\.lt", "setp.le"},
    {"^setp\\.lt", "setp.gt"},
    {"^setp\\.gt", "setp.ge"},
    {"^setp\\.gt", "setp.lt"},
    {"^setp\\.ge", "setp.gt"},
    {"^setp\\.ge", "setp.lt"},
    {"^setp\\.lt", "setp.ne"},
    {"^setp\\.ge", "setp.eq"},
    // types
    {"^(setp\\.[lg][te]|min|div|mul\\.wide)\\.u32", "$1.s32"},
    {"^(setp\\.[lg][te]|min|div|mul\\.wide)\\.s32", "$1.u32"},
    {"^cvt\\.u64\\.u32", "cvt.s64.s32"},
    {"^cvt\\.u64\\.u32", "cvt.u64.u16"},
    {"^(ld|st)(.*)\\.u64", "$1$2.u32"},
    {"^(ld|st)(.*)\\.u32", "$1$2.u16"},
    {"^(ld|st)(.*)\\.u16", "$1$2.u8"},
    {"^(ld|st)(.*)\\.u8", "$1$2.u16"},
};

const std::map<std::string, std::vector<std::string>> kSpecialRegisters{
    {"%tid.x", {"%tid.y", "%ctaid.x"}},
    {"%ntid.x", {"%ntid.y", "%nctaid.x"}},
    {"%ctaid.x", {"%ctaid.y", "%tid.x"}},
    {"%nctaid.x", {"%nctaid.y", "%ntid.x"}},
};

// Of a commutative instruction the operands are not swapped: nothing would change.
bool is_commutative(const std::string& mnemonic) {
  static const std::regex kCommutative("^(add|mul|min|max|and|or|xor|setp\\.(eq|ne))\\..*");
  return std::regex_match(mnemonic, kCommutative);
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

struct Parts {
  std::string guard;  // with @ and the blank after it
  std::string mnemonic;
  std::vector<std::string> operands;  // braces and brackets belong to their first and last register

  std::string joined() const {
    std::string line = "\t" + guard + mnemonic;
    for (size_t i = 0; i < operands.size(); ++i) line += (i == 0 ? " \t" : ", ") + operands[i];
    return line + ";";
  }
};

class Generator {
 public:
  explicit Generator(const std::string& ptx) : lines_(lines_of(ptx)) {
    for (const std::string& line : lines_) {
      if (is_label(line)) labels_.push_back(line.substr(0, line.find(':')));
    }
  }

  std::vector<Mutant> run() {
    static const std::regex kInstruction("\\s+(@!?%p\\d+\\s+)?([a-z][a-z0-9.]*)\\s*([^;]*);");
    for (line_ = 0; line_ < lines_.size(); ++line_) {
      std::smatch match;
      if (!std::regex_match(lines_[line_], match, kInstruction)) continue;
      const Parts parts{match[1], match[2], split(match[3])};
      mutate_guard(parts);
      mutate_mnemonic(parts);
      for (size_t i = 0; i < parts.operands.size(); ++i) mutate_operand(parts, i);
      swap_operands(parts);
      if (parts.mnemonic != "ret") add("");
      if (!parts.operands.empty()) remember(parts.operands[0]);
    }
    return std::move(mutants_);
  }

 private:
  static bool is_label(const std::string& line) { return !line.empty() && line[0] == '$'; }

  static std::vector<std::string> split(const std::string& operands) {
    std::vector<std::string> parts;
    std::istringstream stream(operands);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part.substr(part.find_first_not_of(' ')));
    return parts;
  }

  void add(const std::string& after) { mutants_.push_back({static_cast<int>(line_) + 1, lines_[line_], after}); }

  void add_with_operand(Parts parts, size_t index, const std::string& operand) {
    if (operand == parts.operands[index]) return;
    parts.operands[index] = operand;
    add(parts.joined());
  }

  void mutate_guard(Parts parts) {
    if (parts.guard.empty()) return;
    const std::string guard = parts.guard;
    parts.guard = guard[1] == '!' ? "@" + guard.substr(2) : "@!" + guard.substr(1);
    add(parts.joined());
    parts.guard.clear();
    add(parts.joined());
  }

  void mutate_mnemonic(const Parts& parts) {
    for (const Substitution& substitution : kInMnemonics) {
      Parts changed = parts;
      changed.mnemonic = std::regex_replace(parts.mnemonic, std::regex(substitution.pattern), substitution.replacement);
      if (changed.mnemonic != parts.mnemonic) add(changed.joined());
    }
  }

  void mutate_operand(const Parts& parts, size_t index) {
    const std::string& operand = parts.operands[index];
    const auto special = kSpecialRegisters.find(operand);
    if (special != kSpecialRegisters.end()) {
      for (const std::string& other : special->second) add_with_operand(parts, index, other);
    } else if (operand[0] == '$') {
      branch_elsewhere(parts, index);
    } else {
      change_number(parts, index);
      change_register(parts, index);
    }
  }

  void branch_elsewhere(const Parts& parts, size_t index) {
    const auto label = std::find(labels_.begin(), labels_.end(), parts.operands[index]);
    if (label != labels_.begin()) add_with_operand(parts, index, *(label - 1));
    if (label + 1 != labels_.end()) add_with_operand(parts, index, *(label + 1));
  }

  // A number that stands alone by one; an offset in bytes by the width of what lies beside.
  void change_number(const Parts& parts, size_t index) {
    static const std::regex kNumber("(\\[.*\\+)?(-?\\d+)(\\]?)");
    std::smatch match;
    if (!std::regex_match(parts.operands[index], match, kNumber)) return;
    for (const int64_t by : {-1, 1}) {
      const int64_t step = match[1].matched ? 8 : 1;
      add_with_operand(parts, index,
                       match[1].str() + std::to_string(std::stoll(match[2]) + by * step) + match[3].str());
    }
  }

  // Another register of the same kind that was written before.
  void change_register(const Parts& parts, size_t index) {
    static const std::regex kRegister("([{\\[]?)(%[a-z]+)(\\d+)(.*)");
    std::smatch match;
    const bool written = index == 0 && parts.mnemonic.rfind("st", 0) != 0;
    if (written || !std::regex_match(parts.operands[index], match, kRegister)) return;
    const std::string name = match[2].str() + match[3].str();
    int others = 2;
    const std::vector<std::string>& known = written_[match[2].str()];
    for (auto other = known.rbegin(); other != known.rend() && others > 0; ++other) {
      if (*other == name) continue;
      add_with_operand(parts, index, match[1].str() + *other + match[4].str());
      --others;
    }
  }

  // Neighbours that are read. Elements of a vector trade places within their braces.
  void swap_operands(const Parts& parts) {
    if (is_commutative(parts.mnemonic)) return;
    for (size_t i = 1; i + 1 < parts.operands.size(); ++i) {
      Parts swapped = parts;
      std::string& a = swapped.operands[i];
      std::string& b = swapped.operands[i + 1];
      if (a.back() == '}') continue;
      std::swap(a, b);
      if (a.back() == '}') {
        a.pop_back();
        b += '}';
      }
      if (b[0] == '{') {
        b.erase(0, 1);
        a = "{" + a;
      }
      add(swapped.joined());
    }
  }

  void remember(const std::string& destination) {
    static const std::regex kName("\\{?(%[a-z]+)(\\d+)");
    std::smatch match;
    if (std::regex_match(destination, match, kName)) written_[match[1]].push_back(match[1].str() + match[2].str());
  }

  std::vector<std::string> lines_;
  std::vector<std::string> labels_;
  size_t line_ = 0;
  std::map<std::string, std::vector<std::string>> written_;  // by kind of register
  std::vector<Mutant> mutants_;
};

}  // namespace

std::vector<Mutant> mutants_of(const std::string& ptx) { return Generator(ptx).run(); }

std::string mutated(const Mutant& mutant, const std::string& ptx) {
  std::vector<std::string> lines = lines_of(ptx);
  lines[static_cast<size_t>(mutant.line) - 1] = mutant.after;
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

}  // namespace simcuda::testing
