#include "transfer/cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "io/text_file.h"

namespace dcp_fast::transfer {

namespace {

constexpr int kMostProcesses = 4096;

int cores_of_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // This fails if there are more cores than the set holds. Then the number of all cores serves as well.
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

int processes_of_this_machine() {
  const char* text = std::getenv("LOCAL_WORLD_SIZE");  // NOLINT(concurrency-mt-unsafe): nobody sets it meanwhile
  const int64_t count = text != nullptr ? std::strtol(text, nullptr, 10) : 1;
  return static_cast<int>(std::clamp<int64_t>(count, 1, kMostProcesses));
}

double number_in(const std::string& text) { return std::strtod(text.c_str(), nullptr); }  // 0 for other words

// Cores of one control group; 0 without a limit.
double quota_of(const std::string& folder) {
  std::string quota = io::read_text(folder + "/cpu.max");  // version 2: "max 100000" or "250000 100000"
  std::string period = quota.substr(std::min(quota.find(' '), quota.size()));
  if (quota.empty()) {
    quota = io::read_text(folder + "/cpu.cfs_quota_us");  // version 1; -1 without a limit
    period = io::read_text(folder + "/cpu.cfs_period_us");
  }
  const double time = number_in(quota);
  const double of = number_in(period);
  return time > 0 && of > 0 ? time / of : 0;
}

// Returns what comes before the mark, and removes it from the text together with the mark.
std::string_view cut(std::string_view& text, char mark) {
  const size_t end = std::min(text.find(mark), text.size());
  const std::string_view part = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return part;
}

}  // namespace

int quota_of_control_groups(const std::string& root) {
  double least = 0;
  // A limit holds for all that is below it.
  const auto look_at = [&](const std::string& mount, std::string group) {
    for (;;) {
      const double quota = quota_of(mount + group);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (group.empty()) return;
      group.erase(group.rfind('/'));
    }
  };
  const std::string groups = io::read_text(root + "/proc/self/cgroup");
  for (std::string_view rest = groups; !rest.empty();) {
    std::string_view line = cut(rest, '\n');  // such as "0::/a/b" and "4:cpu,cpuacct:/a/b"
    const std::string_view number = cut(line, ':');
    const std::string controllers(cut(line, ':'));
    const std::string group(line == "/" ? std::string_view() : line);
    if (!group.empty() && group[0] != '/') continue;
    if (number == "0" && controllers.empty()) {
      look_at(root + "/sys/fs/cgroup", group);
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      look_at(root + "/sys/fs/cgroup/cpu", group);
    }
  }
  return static_cast<int>(std::ceil(least));
}

int usable_cores() {
  static const int quota = quota_of_control_groups();
  int shared = static_cast<int>(std::thread::hardware_concurrency());
  if (quota > 0) shared = std::min(shared, quota);
  return std::max(1, std::min(cores_of_affinity(), shared / processes_of_this_machine()));
}

}  // namespace dcp_fast::transfer
