// The kernel that moves the boxes of a slot to where they belong. generate_ptx.py compiles it to box_copy.ptx, which is
// what ships; see there for what that asks of this file.
#include "cuda/box_copy.h"

using dcp_fast::cuda::BoxCopy;
using dcp_fast::cuda::BoxDim;

namespace {

// Vectors that a thread has in flight at once: enough to cover the latency of memory with blocks that are not many.
constexpr uint32_t kBatch = 4;

template <typename T>
__device__ const T* pointer_to(uint64_t address) {
  return reinterpret_cast<const T*>(address);
}

// Where vectors of a contiguous destination lie: bytes from its start.
struct Contiguous {
  uint32_t vector_bytes;

  __device__ void place(const uint32_t (&indices)[kBatch], uint64_t (&offsets)[kBatch]) const {
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) offsets[k] = static_cast<uint64_t>(indices[k]) * vector_bytes;
  }
};

struct Strided {
  const BoxDim* dims;
  uint32_t count;

  // All vectors of a batch share the reading of the dimensions. The outermost one takes what is left of the index
  // without a division. Uses up the indices.
  __device__ void place(uint32_t (&indices)[kBatch], uint64_t (&offsets)[kBatch]) const {
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) offsets[k] = 0;
#pragma unroll 1
    for (uint32_t dim = count - 1; dim > 0; --dim) {
      const uint32_t size = __ldg(&dims[dim].size);
      const uint64_t stride = stride_of(dim);
#pragma unroll
      for (uint32_t k = 0; k < kBatch; ++k) {
        const uint32_t outer = indices[k] / size;
        offsets[k] += (indices[k] - outer * size) * stride;
        indices[k] = outer;
      }
    }
    const uint64_t stride = stride_of(0);
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) offsets[k] += indices[k] * stride;
  }

  // Unsigned, so that a negative stride wraps around as it should.
  __device__ uint64_t stride_of(uint32_t dim) const {
    return __ldg(reinterpret_cast<const unsigned long*>(&dims[dim].stride));
  }
};

// Neighbouring threads copy neighbouring vectors. All loads of a batch come before its stores; past the entry's end
// they read its last vector once more, as a branch around each would let them wait for one another.
template <typename Vector, typename Placement>
__device__ void copy_vectors(const BoxCopy& entry, uint64_t slot, const Placement& placement) {
  const Vector* source = pointer_to<Vector>(slot + entry.source);
#pragma unroll 1
  for (uint32_t begin = threadIdx.x; begin < entry.count; begin += kBatch * blockDim.x) {
    Vector values[kBatch];
    uint32_t indices[kBatch];
    uint64_t offsets[kBatch];
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) {
      indices[k] = entry.first + (k == 0 ? begin : min(begin + k * blockDim.x, entry.count - 1));
      values[k] = __ldg(source + indices[k]);
    }
    placement.place(indices, offsets);
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) {
      if (k > 0 && begin + k * blockDim.x >= entry.count) break;
      __stwb(reinterpret_cast<Vector*>(entry.destination + offsets[k]), values[k]);
    }
  }
}

template <typename Vector>
__device__ void copy_entry(const BoxCopy& entry, uint64_t slot) {
  if (entry.dim_count == 0) {
    copy_vectors<Vector>(entry, slot, Contiguous{sizeof(Vector)});
  } else {
    copy_vectors<Vector>(entry, slot, Strided{pointer_to<BoxDim>(slot + entry.dims), entry.dim_count});
  }
}

}  // namespace

// `entries`: bytes from the slot's start to its BoxCopys. One block an entry, and more where the grid is smaller.
extern "C" __global__ void __launch_bounds__(256)
    dcp_fast_box_copy(uint64_t slot, uint32_t entries, uint32_t entry_count) {
  for (uint32_t i = blockIdx.x; i < entry_count; i += gridDim.x) {
    const BoxCopy entry = pointer_to<BoxCopy>(slot + entries)[i];
    switch (entry.vector_bytes) {
      case 16:
        copy_entry<uint4>(entry, slot);
        break;
      case 8:
        copy_entry<uint2>(entry, slot);
        break;
      case 4:
        copy_entry<uint32_t>(entry, slot);
        break;
      case 2:
        copy_entry<uint16_t>(entry, slot);
        break;
      default:
        copy_entry<uint8_t>(entry, slot);
    }
  }
}
