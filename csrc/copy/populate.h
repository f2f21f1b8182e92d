// Memory that nobody has touched yet.
#pragma once

#include <cstddef>

namespace dcp_fast::copy {

// Has the system find memory for [begin, begin + size), all of which is written next, if its middle was never touched.
// That takes a third less time than the faults of a copy, one for each page. Nothing is lost where the system cannot.
void populate(std::byte* begin, size_t size) noexcept;

}  // namespace dcp_fast::copy
