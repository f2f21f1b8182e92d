// Memory near a device, on machines of several NUMA nodes. A copy from another node's memory crosses one more link.
#pragma once

#include <cstddef>
#include <string>

namespace dcp_fast::cuda {

// The node of a PCI device, whose id is as the driver writes it. -1 where the system has one node alone, or none of
// this is known.
int numa_node_of(std::string pci_bus_id, const std::string& sysfs = "/sys");

// Asks the system to take pages of this range that nobody has touched yet from the node, as long as it has any. If the
// system refuses, as in some containers, copies are slower.
void prefer_node(void* begin, size_t bytes, int node) noexcept;

}  // namespace dcp_fast::cuda
