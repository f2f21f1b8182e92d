// Reads JSON (RFC 8259) value by value, as strictly as the safetensors project does: whoever reads says what must come,
// and anything else is an error. Nothing is kept but the position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dcp_fast::metadata {

class Json {
 public:
  // `text` must be UTF-8, which is_text tells. `offset`: where it begins in its file.
  Json(std::string_view text, int64_t offset) : text_(text), offset_(offset) {}

  // Whether bytes are UTF-8 without surrogates, which JSON cannot be without.
  static bool is_text(std::string_view bytes);

  // All of the following throw Error(kCorruptHeader), with the position in the file.

  // Calls visit(key) for every member of the object that comes next. It must take the value.
  template <typename Visit>
  void object(const Visit& visit) {
    begin('{', "an object");
    if (take('}')) return end();
    do {
      visit(key());
    } while (take(','));
    expect('}');
    end();
  }

  // Calls visit() for every value of the array that comes next. It must take the value.
  template <typename Visit>
  void array(const Visit& visit) {
    begin('[', "an array");
    if (take(']')) return end();
    do {
      visit();
    } while (take(','));
    expect(']');
    end();
  }

  std::string string();

  // An integer from 0 to what int64_t holds.
  int64_t count();

  // Any value.
  void skip();

  // Takes a null, if one comes.
  bool take_null() { return take_word("null"); }

  // Nothing but white space may follow.
  void finish();

  // In the file.
  int64_t position() const { return offset_ + static_cast<int64_t>(position_); }

  [[noreturn]] void fail(const std::string& reason) const;

 private:
  // As many objects and arrays may be within each other as in the safetensors project.
  static constexpr int kMostDepth = 127;

  char peek();  // past white space; 0 at the end
  bool take(char expected);
  bool take_word(std::string_view word);
  void expect(char expected);
  void begin(char opening, const char* what);
  void end() { --depth_; }
  std::string key();
  size_t digits();
  void skip_number();
  void escape(std::string& result);
  uint32_t hex();

  std::string_view text_;
  int64_t offset_;
  size_t position_ = 0;
  int depth_ = 0;
};

}  // namespace dcp_fast::metadata
