// Driver calls: copies and fills.
#include "driver/copies.h"

namespace simcuda {

namespace {

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

}  // namespace

extern "C" {

CUresult CUDAAPI cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return call("cuMemcpyHtoDAsync_v2", Needs::kContext,
              [&](Call& call) { copy_asynchronously(call, {Direction::kToDevice, to, address(from), bytes}, stream); });
}

CUresult CUDAAPI cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return call("cuMemcpyDtoHAsync_v2", Needs::kContext,
              [&](Call& call) { copy_asynchronously(call, {Direction::kToHost, address(to), from, bytes}, stream); });
}

CUresult CUDAAPI cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return call("cuMemcpyDtoDAsync_v2", Needs::kContext,
              [&](Call& call) { copy_asynchronously(call, {Direction::kOnDevice, to, from, bytes}, stream); });
}

CUresult CUDAAPI cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return call("cuMemcpyHtoD_v2", Needs::kContext,
              [&](Call& call) { copy_and_wait(call, {Direction::kToDevice, to, address(from), bytes}); });
}

CUresult CUDAAPI cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return call("cuMemcpyDtoH_v2", Needs::kContext,
              [&](Call& call) { copy_and_wait(call, {Direction::kToHost, address(to), from, bytes}); });
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
  return call("cuMemsetD8Async", Needs::kContext,
              [&](Call& call) { fill_asynchronously(call, to, value, bytes, stream); });
}

}  // extern "C"

}  // namespace simcuda
