#include "ptx/parser.h"

#include <cstddef>
#include <cstdint>
#include <utility>

#include "ptx/decoder.h"
#include "ptx/lexer.h"
#include "ptx/statement.h"
#include "ptx/symbols.h"
#include "ptx/type.h"

namespace simcuda::ptx {

namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokenize(text)) {}

  std::vector<Program> run() {
    directive(".version", TokenKind::kNumber);
    directive(".target", TokenKind::kWord);
    if (directive(".address_size", TokenKind::kNumber) != "64") fail("addresses have to have 64 bits");
    std::vector<Program> kernels;
    while (token().kind != TokenKind::kEnd) kernels.push_back(kernel());
    return kernels;
  }

 private:
  const Token& token() const { return tokens_[at_]; }
  int line() const { return token().line; }
  [[noreturn]] void fail(const std::string& message) const { throw error_at(line(), message); }

  bool take(char symbol) {
    if (!token().is(symbol)) return false;
    ++at_;
    return true;
  }
  bool take_word(const char* word) {
    if (!token().is_word(word)) return false;
    ++at_;
    return true;
  }
  std::string take(TokenKind kind, const char* what) {
    if (token().kind != kind) fail("expected " + std::string(what) + ", not '" + token().text + "'");
    return tokens_[at_++].text;
  }
  std::string name() {
    if (token().text[0] == '.') fail("expected a name, not '" + token().text + "'");
    return take(TokenKind::kWord, "a name");
  }
  size_t number() {
    const std::string text = take(TokenKind::kNumber, "a number");
    return static_cast<size_t>(parse_number(text, tokens_[at_ - 1].line));
  }
  void require(char symbol) {
    if (!take(symbol)) fail(std::string("expected '") + symbol + "', not '" + token().text + "'");
  }

  std::string directive(const char* word, TokenKind value) {
    if (!take_word(word)) fail("expected " + std::string(word) + ", not '" + token().text + "'");
    return take(value, "its value");
  }

  // The type that a directive's word such as ".u32" names.
  Type type() {
    const std::optional<Type> named = type_named(token().text.substr(1));
    if (token().kind != TokenKind::kWord || token().text[0] != '.' || !named) {
      fail("unknown type '" + token().text + "'");
    }
    ++at_;
    return *named;
  }

  Program kernel() {
    take_word(".visible");
    Program program;
    program.name = directive(".entry", TokenKind::kWord);
    require('(');
    while (!token().is(')')) {
      parameter(program);
      if (!take(',')) break;
    }
    require(')');
    if (take_word(".maxntid")) {
      program.max_threads = number();
      while (take(',')) program.max_threads *= number();
    }
    require('{');
    body(program);
    return program;
  }

  void parameter(Program& program) {
    if (!take_word(".param")) fail("expected .param, not '" + token().text + "'");
    size_t alignment = take_word(".align") ? number() : 0;
    const Type element = type();
    if (element.kind == TypeKind::kPredicate) fail("a predicate is no parameter");
    Parameter parameter{name(), static_cast<size_t>(element.bits / 8), 0};
    if (alignment == 0) alignment = parameter.size;
    if (take('[')) {
      parameter.size *= number();
      require(']');
    }
    parameter.offset = (program.parameter_bytes + alignment - 1) / alignment * alignment;
    program.parameter_bytes = parameter.offset + parameter.size;
    program.parameters.push_back(parameter);
  }

  // Labels are known only when all statements have been read, so that decoding follows at the end.
  void body(Program& program) {
    Symbols symbols(program);
    std::vector<Statement> statements;
    const int begin = line();
    while (!take('}')) {
      if (take_word(".reg")) {
        registers(symbols);
      } else if (take_word(".pragma")) {
        // About the compiler's effort, not about what the kernel does.
        if (take(TokenKind::kString, "a string") != "nounroll") fail("unknown pragma");
        require(';');
      } else if (tokens_[at_].kind == TokenKind::kWord && tokens_[at_ + 1].is(':')) {
        symbols.declare_label(token().text, static_cast<uint32_t>(statements.size()), line());
        at_ += 2;
      } else {
        statements.push_back(statement());
      }
    }
    for (const Statement& statement : statements) program.code.push_back(decode(statement, symbols));
    for (const Instruction& instruction : program.code) {
      if (instruction.target == program.code.size())
        throw error_at(instruction.line, "branches past the last instruction");
    }
    const bool ends = !statements.empty() && statements.back().guard.empty() &&
                      (statements.back().mnemonic == "ret" || statements.back().mnemonic.rfind("bra", 0) == 0);
    if (!ends) throw error_at(statements.empty() ? begin : statements.back().line, "the kernel does not end with ret");
  }

  void registers(Symbols& symbols) {
    const Type element = type();
    do {
      const int at = line();
      const std::string prefix = name();
      if (take('<')) {
        const size_t count = number();
        require('>');
        for (size_t i = 0; i < count; ++i) symbols.declare_register(prefix + std::to_string(i), element.bits, at);
      } else {
        symbols.declare_register(prefix, element.bits, at);
      }
    } while (take(','));
    require(';');
  }

  Statement statement() {
    Statement result;
    result.line = line();
    if (take('@')) {
      if (take('!')) result.guard_sense = GuardSense::kFalse;
      result.guard = name();
    }
    result.mnemonic = take(TokenKind::kWord, "an instruction");
    if (take(';')) return result;
    do result.operands.push_back(operand());
    while (take(','));
    require(';');
    return result;
  }

  OperandText operand() {
    OperandText result;
    if (take('{')) {
      result.kind = OperandKind::kVector;
      do result.names.push_back(name());
      while (take(','));
      require('}');
    } else if (take('[')) {
      result.kind = OperandKind::kAddress;
      result.names.push_back(name());
      if (take('+')) result.number = take(TokenKind::kNumber, "an offset");
      require(']');
    } else if (token().kind == TokenKind::kNumber) {
      result.kind = OperandKind::kNumber;
      result.number = take(TokenKind::kNumber, "a number");
    } else {
      result.names.push_back(name());
    }
    return result;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
};

}  // namespace

std::vector<Program> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace simcuda::ptx
