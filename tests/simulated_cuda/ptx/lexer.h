// PTX text as tokens. Comments are gone, and each token knows its line for the messages.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace simcuda::ptx {

enum class TokenKind {
  kWord,  // names, directives, opcodes with their modifiers, registers, labels: everything of letters, digits and _$%.
  kNumber,  // with its sign
  kString,  // without its quotes
  kSymbol,  // one character of punctuation
  kEnd,
};

struct Token {
  TokenKind kind = TokenKind::kEnd;
  std::string text;
  int line = 0;

  bool is(char symbol) const { return kind == TokenKind::kSymbol && text[0] == symbol; }
  bool is_word(const char* word) const { return kind == TokenKind::kWord && text == word; }
};

// The exception for anything in the text that is not understood.
std::runtime_error error_at(int line, const std::string& message);

// Ends with a token of kind kEnd.
std::vector<Token> tokenize(const std::string& text);

}  // namespace simcuda::ptx
