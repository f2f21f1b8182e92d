// On machines of several NUMA nodes, memory near a device: copies from another node's cross one more link.
#pragma once

#include <cstddef>
#include <string>

namespace dcp_fast::cuda {

// The node of a PCI device, whose id is as the driver writes it. -1 where the system has one node alone, or none of
// this is known.
int numa_node_of(std::string pci_bus_id, const std::string& sysfs = "/sys");

// Pages of this range that nobody has touched yet come from the node, as long as it has any. Where the system refuses
// (containers may), all works the same, if slower.
void prefer_node(void* begin, size_t bytes, int node) noexcept;

}  // namespace dcp_fast::cuda
