#include "transfer/node.h"

#include <cstdlib>
#include <string>

#include "doctest/doctest.h"
#include "transfer/launched.h"
#include "transfer/machine.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using transfer::Node;
using transfer::node_of_this_process;

namespace {

int64_t room_of(const Machine& machine) { return transfer::room_for_page_cache(machine.root()); }

Node node_of(const char* ranks, const char* rank) {
  const Launched launched(ranks, rank);
  return node_of_this_process();
}

}  // namespace

TEST_CASE("node: the launcher tells how many ranks there are, and which one this is") {
  struct Expected {
    const char* ranks;
    const char* rank;
    int of_ranks;
    int of_rank;
  };
  for (const Expected& expected :
       {Expected{nullptr, nullptr, 1, 0}, Expected{"8", "3", 8, 3}, Expected{"8", nullptr, 8, 0},
        Expected{nullptr, "3", 1, 0}, Expected{"8", "8", 8, 7}, Expected{"8", "-1", 8, 0}, Expected{"0", "0", 1, 0},
        Expected{"many", "first", 1, 0}, Expected{"99999999999999999999", "99999999999999999999", 4096, 4095}}) {
    const Node node = node_of(expected.ranks, expected.rank);
    CHECK(node.ranks == expected.of_ranks);
    CHECK(node.rank == expected.of_rank);
  }
}

TEST_CASE("node: the page cache may fill what memory is available") {
  const Machine machine;
  CHECK(room_of(machine) == 0);
  machine.write("/proc/meminfo", "MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable:    3000 kB\nBuffers: 1 kB\n");
  CHECK(room_of(machine) == 3000 * 1024);
  machine.write("/proc/self/cgroup", "0::/jobs/one\n");
  CHECK(room_of(machine) == 3000 * 1024);
  CHECK(transfer::room_for_page_cache() > 0);  // of the machine that the test runs on
}

TEST_CASE("node: control groups limit the page cache, where what it holds already counts as room") {
  const Machine machine;
  machine.write("/proc/meminfo", "MemAvailable: 3000 kB\n");
  machine.write("/proc/self/cgroup", "0::/jobs/one\n");
  machine.write("/sys/fs/cgroup/jobs/one/memory.max", "max\n");
  CHECK(room_of(machine) == 3000 * 1024);
  machine.write("/sys/fs/cgroup/jobs/memory.max", "1000000\n");
  machine.write("/sys/fs/cgroup/jobs/memory.current", "900000\n");
  CHECK(room_of(machine) == 100000);
  machine.write("/sys/fs/cgroup/jobs/memory.stat", "anon 5\nfile 9\ninactive_file 20000\nactive_file 3000");
  CHECK(room_of(machine) == 123000);
  machine.write("/sys/fs/cgroup/jobs/memory.current", "2000000\n");
  CHECK(room_of(machine) == 0);
}

TEST_CASE("node: control groups of version 1 limit the page cache") {
  const Machine machine;
  machine.write("/proc/meminfo", "MemAvailable: 3000 kB\n");
  machine.write("/proc/self/cgroup", "7:memory:/a\n4:cpu:/a\n");
  machine.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  machine.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n");
  machine.write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "500000\n");
  machine.write("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", "400000\n");
  machine.write("/sys/fs/cgroup/memory/a/memory.stat",
                "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 7\n");
  CHECK(room_of(machine) == 100057);
}

TEST_CASE("node: ranks that cannot all need other records share the page cache, where it has room") {
  using transfer::shares_page_cache;
  constexpr int64_t kRoom = 1000;
  const Node eight{8, 3};
  CHECK(shares_page_cache(eight, 800, 800, kRoom));         // each needs all
  CHECK(shares_page_cache(eight, 200, 800, kRoom));         // two replicas
  CHECK_FALSE(shares_page_cache(eight, 100, 800, kRoom));   // each needs a part of its own
  CHECK_FALSE(shares_page_cache(eight, 105, 800, kRoom));   // and small tensors that all need
  CHECK_FALSE(shares_page_cache(eight, 100, 6400, kRoom));  // as do ranks of other nodes
  CHECK_FALSE(shares_page_cache({1, 0}, 800, 800, kRoom));
  CHECK_FALSE(shares_page_cache(eight, 0, 0, kRoom));
  // What all read must fit, however often it is read, and however much other nodes read.
  CHECK_FALSE(shares_page_cache(eight, 1001, 1001, kRoom));
  CHECK(shares_page_cache(eight, 124, 800, 992));
  CHECK(shares_page_cache(eight, 1000, 1000, kRoom));
  CHECK_FALSE(shares_page_cache(eight, 200, 1200, kRoom));
}
