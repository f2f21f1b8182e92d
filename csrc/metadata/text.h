// Texts in pickles: UTF-8 in which lone surrogates are allowed, as Python's "surrogatepass" has it.
#pragma once

#include <string>
#include <string_view>

namespace dcp_fast::metadata {

bool is_utf8(std::string_view text);

// Decodes Python's raw-unicode-escape, in which protocol 0 writes texts, and appends it in UTF-8. False if an escape is
// cut short or no code point.
bool append_decoded(std::string_view escaped, std::string& text);

}  // namespace dcp_fast::metadata
