#include "transfer/cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

namespace dcp_fast::transfer {

namespace {

constexpr int kMostProcesses = 4096;

int cores_of_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // Fails where there are more cores than the set holds: that is a limit that no reader cares for.
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

int processes_of_this_machine() {
  const char* text = std::getenv("LOCAL_WORLD_SIZE");  // NOLINT(concurrency-mt-unsafe): nobody sets it meanwhile
  const int64_t count = text != nullptr ? std::strtol(text, nullptr, 10) : 1;
  return static_cast<int>(std::clamp<int64_t>(count, 1, kMostProcesses));
}

// Cores of one control group; 0 without a limit.
double quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  std::ifstream(folder + "/cpu.max") >> quota >> period;  // version 2: "max 100000" or "250000 100000"
  if (period <= 0) {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // version 1; -1 without a limit
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  const double time = std::strtod(quota.c_str(), nullptr);  // 0 for "max"
  return time > 0 && period > 0 ? time / period : 0;
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
  std::ifstream groups(root + "/proc/self/cgroup");  // lines such as "0::/a/b" and "4:cpu,cpuacct:/a/b"
  for (std::string line; std::getline(groups, line);) {
    std::istringstream parts(line);
    std::string number;
    std::string controllers;
    std::string group;
    std::getline(parts, number, ':');
    std::getline(parts, controllers, ':');
    std::getline(parts, group);
    if (group == "/") group.clear();
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
