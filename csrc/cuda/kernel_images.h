// The kernels as they ship: compiled for common devices, and as text for all others.
#pragma once

#include <cstddef>

namespace dcp_fast::cuda {

struct KernelBinary {
  // Of compute capability: a device of the same major version that is as new runs it.
  int major;
  int minor;
  const void* image;
};

struct KernelImages {
  const char* name;  // of the function
  const KernelBinary* binaries;
  size_t binary_count;
  // PTX, which the driver compiles for the device that it finds. Ends with a zero.
  const char* ptx;
};

extern const KernelImages kBoxCopyImages;     // of box_copy.cu
extern const KernelImages kDequantizeImages;  // of dequantize.cu

}  // namespace dcp_fast::cuda
