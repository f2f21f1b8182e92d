// Runs a function in a child process. There the driver is fresh, and what an asynchronous error breaks for good, or a
// hang, ends with the child. The parent must not touch the driver: no child could use it then.
#pragma once

#include <functional>
#include <string>

namespace dcp_fast::testing {

// Returns what the function returns, or how it ended otherwise: by an exception, a signal, or after `seconds`.
std::string in_child(const std::function<std::string()>& body, unsigned seconds = 60);

}  // namespace dcp_fast::testing
