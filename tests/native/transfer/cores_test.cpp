#include "transfer/cores.h"

#include <sched.h>

#include <cstdlib>

#include "doctest/doctest.h"
#include "transfer/machine.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using transfer::usable_cores;

namespace {

int quota_of(const Machine& machine) { return transfer::quota_of_control_groups(machine.root()); }

}  // namespace

TEST_CASE("cores: the tightest limit of all groups above a process holds, rounded up") {
  const Machine machine;
  CHECK(quota_of(machine) == 0);
  machine.write("/proc/self/cgroup", "0::/jobs/one\n");
  CHECK(quota_of(machine) == 0);
  machine.write("/sys/fs/cgroup/jobs/one/cpu.max", "max 100000\n");
  CHECK(quota_of(machine) == 0);
  machine.write("/sys/fs/cgroup/jobs/cpu.max", "250000 100000\n");
  CHECK(quota_of(machine) == 3);
  machine.write("/sys/fs/cgroup/jobs/one/cpu.max", "50000 100000\n");
  CHECK(quota_of(machine) == 1);
  machine.write("/sys/fs/cgroup/jobs/one/cpu.max", "800000 100000\n");
  CHECK(quota_of(machine) == 3);
}

TEST_CASE("cores: in a container its own group is the root") {
  const Machine machine;
  machine.write("/proc/self/cgroup", "0::/\n");
  machine.write("/sys/fs/cgroup/cpu.max", "400000 100000\n");
  CHECK(quota_of(machine) == 4);
}

TEST_CASE("cores: control groups of version 1") {
  const Machine machine;
  machine.write("/proc/self/cgroup", "7:memory:/a\n4:cpuacct,cpu:/a\n0::/a\n");
  machine.write("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n");
  machine.write("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
  CHECK(quota_of(machine) == 0);
  machine.write("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "600000\n");
  CHECK(quota_of(machine) == 6);
}

TEST_CASE("cores: nonsense is no limit") {
  const Machine machine;
  machine.write("/proc/self/cgroup", "\n::\nno colon\n0::\n0::relative/path\n1:cpu:\n");
  machine.write("/sys/fs/cgroup/cpu.max", "many few\n");
  CHECK(quota_of(machine) == 0);
}

TEST_CASE("cores: those that a process may run on, divided among the processes of a machine") {
  cpu_set_t before;
  REQUIRE(::sched_getaffinity(0, sizeof before, &before) == 0);
  const int all = usable_cores();
  CHECK(all >= 1);
  CHECK(all <= CPU_COUNT(&before));
  ::setenv("LOCAL_WORLD_SIZE", "1000", 1);  // NOLINT(concurrency-mt-unsafe)
  CHECK(usable_cores() == 1);
  ::setenv("LOCAL_WORLD_SIZE", "none", 1);  // NOLINT(concurrency-mt-unsafe)
  CHECK(usable_cores() == all);
  ::unsetenv("LOCAL_WORLD_SIZE");  // NOLINT(concurrency-mt-unsafe)
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  }
  REQUIRE(::sched_setaffinity(0, sizeof one, &one) == 0);
  CHECK(usable_cores() == 1);
  ::sched_setaffinity(0, sizeof before, &before);
}
