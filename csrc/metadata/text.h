// Texts in pickles: UTF-8 in which lone surrogates are allowed, as Python's "surrogatepass" has it.
#pragma once

#include <string_view>

namespace dcp_fast::metadata {

bool is_utf8(std::string_view text);

}  // namespace dcp_fast::metadata
