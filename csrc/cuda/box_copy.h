// What a slot tells the kernel of box_copy.cu. A slot is one contiguous piece of memory that is copied to the device as
// it is: boxes packed one after another, then BoxDims and BoxCopys, which say where in the destinations the boxes
// belong. nvcc and the host's compiler both read this file, so it stays plain.
#pragma once

#include <stdint.h>  // NOLINT(modernize-deprecated-headers): nvcc needs no C++ library for it

namespace dcp_fast::cuda {

struct BoxDim {
  uint32_t size;  // how many; vectors in the innermost dimension
  uint32_t unused;
  int64_t stride;  // bytes in the destination
};

// The work of one thread block: some or all vectors of one box. 8-byte aligned in the slot, as BoxDim is.
struct BoxCopy {
  uint64_t destination;   // device address of the box's first byte
  uint32_t source;        // bytes from the slot's start to the packed box
  uint32_t first;         // vector of the packed box to begin with
  uint32_t count;         // of vectors, below 2^31
  uint32_t dims;          // bytes from the slot's start to the BoxDims, outermost first
  uint32_t dim_count;     // 0: the destination is contiguous. Else the innermost one has vector_bytes for its stride
  uint32_t vector_bytes;  // 1, 2, 4, 8 or 16; divides addresses, source, strides and the innermost dimension's bytes
};

static_assert(sizeof(BoxDim) == 16 && sizeof(BoxCopy) == 32, "written by the host, read by the device");

}  // namespace dcp_fast::cuda
