#include "transfer/cores.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <thread>

#include "io/text_file.h"
#include "transfer/control_groups.h"
#include "transfer/node.h"

namespace dcp_fast::transfer {

namespace {

int cores_of_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // This fails if there are more cores than the set holds. Then the number of all cores serves as well.
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
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

}  // namespace

int quota_of_control_groups(const std::string& root) {
  double least = 0;
  for_each_control_group(root, "cpu", [&](const std::string& folder) {
    const double quota = quota_of(folder);
    if (quota > 0 && (least == 0 || quota < least)) least = quota;
  });
  return static_cast<int>(std::ceil(least));
}

int usable_cores() {
  static const int quota = quota_of_control_groups();
  int shared = static_cast<int>(std::thread::hardware_concurrency());
  if (quota > 0) shared = std::min(shared, quota);
  return std::max(1, std::min(cores_of_affinity(), shared / node_of_this_process().ranks));
}

}  // namespace dcp_fast::transfer
