#include "transfer/control_groups.h"

#include <algorithm>

#include "io/text_file.h"

namespace dcp_fast::transfer {

namespace {

// Returns what comes before the mark, and removes it from the text together with the mark.
std::string_view cut(std::string_view& text, char mark) {
  const size_t end = std::min(text.find(mark), text.size());
  const std::string_view part = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return part;
}

}  // namespace

void for_each_control_group(const std::string& root, std::string_view controller,
                            const std::function<void(const std::string&)>& look_at) {
  const auto with_those_above = [&](const std::string& mount, std::string group) {
    for (;;) {
      look_at(mount + group);
      if (group.empty()) return;
      group.erase(group.rfind('/'));
    }
  };
  const std::string wanted = "," + std::string(controller) + ",";
  const std::string groups = io::read_text(root + "/proc/self/cgroup");
  for (std::string_view rest = groups; !rest.empty();) {
    std::string_view line = cut(rest, '\n');  // such as "0::/a/b" and "4:cpu,cpuacct:/a/b"
    const std::string_view number = cut(line, ':');
    const std::string controllers(cut(line, ':'));
    const std::string group(line == "/" ? std::string_view() : line);
    if (!group.empty() && group[0] != '/') continue;
    if (number == "0" && controllers.empty()) {
      with_those_above(root + "/sys/fs/cgroup", group);
    } else if (("," + controllers + ",").find(wanted) != std::string::npos) {
      with_those_above(root + "/sys/fs/cgroup/" + std::string(controller), group);
    }
  }
}

}  // namespace dcp_fast::transfer
