// The part of DLPack's C interface that tells what a tensor of Python is, without a call of Python: version 1.3, as
// https://dmlc.github.io/dlpack/latest/c_api.html describes it. A type of tensors has its table of functions.
#pragma once

#include <cstdint>

namespace dcp_fast::dlpack {

constexpr uint32_t kMajor = 1;  // others may have other structures
constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr int32_t kCpu = 1;

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dims;
  uint32_t dtype;  // code, bits and lanes
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  const void* older;
  void (*allocate)();
  void (*to_managed)();
  void (*from_managed)();
  // 0, or -1 and an exception of Python. Sizes and strides are the object's own.
  int (*describe)(void* object, Tensor* out);
};

}  // namespace dcp_fast::dlpack
