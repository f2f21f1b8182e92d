#include "cuda/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <climits>
#include <cstdlib>

#include "io/text_file.h"

namespace dcp_fast::cuda {

namespace {

// Of linux/mempolicy.h, which not every machine has.
constexpr int kPreferred = 1;
constexpr size_t kMaxNodes = 1024;
constexpr size_t kBits = sizeof(unsigned long) * CHAR_BIT;

}  // namespace

int numa_node_of(std::string pci_bus_id, const std::string& sysfs) {
  std::transform(pci_bus_id.begin(), pci_bus_id.end(), pci_bus_id.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const std::string online = io::read_text(sysfs + "/devices/system/node/online");
  // One node is written as "0", several as "0-1" or "0,2".
  if (online.find_first_of("-,") == std::string::npos) return -1;
  const std::string node = io::read_text(sysfs + "/bus/pci/devices/" + pci_bus_id + "/numa_node");
  return node.empty() ? -1 : static_cast<int>(std::strtol(node.c_str(), nullptr, 10));
}

void prefer_node(void* begin, size_t bytes, int node) noexcept {
#ifdef SYS_mbind
  if (node < 0 || static_cast<size_t>(node) >= kMaxNodes) return;
  std::array<unsigned long, kMaxNodes / kBits> mask{};
  mask[static_cast<size_t>(node) / kBits] = 1UL << (static_cast<size_t>(node) % kBits);
  // The kernel takes one bit less than it is told.
  static_cast<void>(::syscall(SYS_mbind, begin, bytes, kPreferred, mask.data(), kMaxNodes + 1, 0));
#endif
}

}  // namespace dcp_fast::cuda
