#include "ptx/lexer.h"

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstring>
#include <utility>

namespace simcuda::ptx {

namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_word_character(char c) { return is_letter(c) || is_digit(c) || c == '_' || c == '$' || c == '%' || c == '.'; }

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) {}

  std::vector<Token> run() {
    for (skip_blanks(); at_ < text_.size(); skip_blanks()) {
      const char c = text_[at_];
      if (is_digit(c) || (c == '-' && is_digit(peek(1)))) {
        const size_t sign = c == '-' ? 1 : 0;
        add(TokenKind::kNumber, length_of_word(sign));
      } else if (is_word_character(c)) {
        add(TokenKind::kWord, length_of_word(0));
      } else if (c == '"') {
        add_string();
      } else if (std::strchr(",;:@!{}[]()<>+", c) != nullptr) {
        add(TokenKind::kSymbol, 1);
      } else {
        throw error_at(line_, std::string("unexpected character '") + c + "'");
      }
    }
    tokens_.push_back({TokenKind::kEnd, "", line_});
    return std::move(tokens_);
  }

 private:
  char peek(size_t ahead) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }

  size_t length_of_word(size_t from) const {
    size_t length = from;
    while (is_word_character(peek(length))) ++length;
    return length;
  }

  void add(TokenKind kind, size_t length) {
    tokens_.push_back({kind, text_.substr(at_, length), line_});
    at_ += length;
  }

  void add_string() {
    const size_t end = text_.find_first_of("\"\n", at_ + 1);
    if (end == std::string::npos || text_[end] == '\n') throw error_at(line_, "a string without an end");
    tokens_.push_back({TokenKind::kString, text_.substr(at_ + 1, end - at_ - 1), line_});
    at_ = end + 1;
  }

  void skip_blanks() {
    while (at_ < text_.size()) {
      if (text_.compare(at_, 2, "//") == 0) {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (text_[at_] == '\n') {
        ++line_;
        ++at_;
      } else if (std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
        ++at_;
      } else {
        return;
      }
    }
  }

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::runtime_error error_at(int line, const std::string& message) {
  return std::runtime_error("PTX line " + std::to_string(line) + ": " + message);
}

std::vector<Token> tokenize(const std::string& text) { return Lexer(text).run(); }

}  // namespace simcuda::ptx
