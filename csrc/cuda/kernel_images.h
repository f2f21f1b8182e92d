// The kernel of box_copy.cu as it ships: compiled for common devices, and as text for all others.
#pragma once

#include <cstddef>

namespace dcp_fast::cuda {

struct KernelBinary {
  // Of compute capability: a device of the same major version that is as new runs it.
  int major;
  int minor;
  const void* image;
};

extern const KernelBinary kBoxCopyBinaries[];
extern const size_t kBoxCopyBinaryCount;
// PTX, which the driver compiles for the device that it finds. Ends with a zero.
extern const char* const kBoxCopyPtx;

}  // namespace dcp_fast::cuda
