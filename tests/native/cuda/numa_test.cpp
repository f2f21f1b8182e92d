#include "cuda/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "doctest/doctest.h"
#include "io/buffer.h"
#include "temp_dir.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using cuda::numa_node_of;
using cuda::prefer_node;

namespace {

void write(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path) << text;
}

}  // namespace

TEST_CASE("numa: sysfs tells the node of a device, whose id the driver writes in capitals") {
  const TempDir folder;
  const std::string sysfs = folder.path("sys");
  CHECK(numa_node_of("0000:3B:00.0", sysfs) == -1);
  write(sysfs + "/devices/system/node/online", "0-1\n");
  CHECK(numa_node_of("0000:3B:00.0", sysfs) == -1);
  write(sysfs + "/bus/pci/devices/0000:3b:00.0/numa_node", "1\n");
  CHECK(numa_node_of("0000:3B:00.0", sysfs) == 1);
  write(sysfs + "/bus/pci/devices/0000:3b:00.0/numa_node", "-1\n");
  CHECK(numa_node_of("0000:3B:00.0", sysfs) == -1);
}

TEST_CASE("numa: where there is one node none is preferred") {
  const TempDir folder;
  const std::string sysfs = folder.path("sys");
  write(sysfs + "/devices/system/node/online", "0\n");
  write(sysfs + "/bus/pci/devices/0000:3b:00.0/numa_node", "0\n");
  CHECK(numa_node_of("0000:3B:00.0", sysfs) == -1);
}

TEST_CASE("numa: pages come from the node that is preferred") {
  constexpr size_t kBytes = 1 << 20;
  constexpr unsigned long kOfAddress = 2;  // MPOL_F_ADDR
  io::AlignedBuffer buffer;
  std::byte* memory = buffer.reserve(kBytes);
  int policy = -1;
  // Sandboxes may refuse both calls.
  if (::syscall(SYS_get_mempolicy, &policy, nullptr, 0, memory, kOfAddress) != 0) return;
  unsigned long node = 1;
  if (::syscall(SYS_mbind, memory, kBytes, policy, &node, 0, 0) != 0) return;
  prefer_node(memory, kBytes, 0);
  REQUIRE(::syscall(SYS_get_mempolicy, &policy, nullptr, 0, memory, kOfAddress) == 0);
  CHECK(policy == 1);  // MPOL_PREFERRED
}

TEST_CASE("numa: memory works whatever node is preferred") {
  constexpr size_t kBytes = 1 << 20;
  for (const int node : {-1, 0, 1, 1023, 1 << 20}) {
    io::AlignedBuffer buffer;
    std::byte* memory = buffer.reserve(kBytes);
    prefer_node(memory, kBytes, node);
    for (size_t i = 0; i < kBytes; i += 4096) memory[i] = std::byte{1};
    CHECK(memory[kBytes - 4096] == std::byte{1});
  }
}
