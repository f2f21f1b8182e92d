// The control groups (version 1 or 2) of a process, which limit what it may use.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace dcp_fast::transfer {

// Calls `look_at` with the folder of the process's own group and of each one above, as far as they can be seen. What
// the files there say differs between the versions. `root`: what stands for "/".
void for_each_control_group(const std::string& root, std::string_view controller,
                            const std::function<void(const std::string&)>& look_at);

}  // namespace dcp_fast::transfer
