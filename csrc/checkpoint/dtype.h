// Element types that DCP stores, by their names in torch and in the pickles that torch.save writes.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace dcp_fast::checkpoint {

// `name` is the attribute of torch (torch.float32); `storage` is the storage class that _rebuild_tensor_v2 names, empty
// for types that are only written by _rebuild_tensor_v3 (an UntypedStorage and the dtype).
struct DTypeInfo {
  std::string_view name;
  std::string_view storage;
  int64_t itemsize;
};

using DType = int8_t;  // index into kDTypes
inline constexpr DType kUnknownDType = -1;

inline constexpr std::array<DTypeInfo, 23> kDTypes = {{
    {"float32", "FloatStorage", 4},
    {"float64", "DoubleStorage", 8},
    {"float16", "HalfStorage", 2},
    {"bfloat16", "BFloat16Storage", 2},
    {"int64", "LongStorage", 8},
    {"int32", "IntStorage", 4},
    {"int16", "ShortStorage", 2},
    {"int8", "CharStorage", 1},
    {"uint8", "ByteStorage", 1},
    {"bool", "BoolStorage", 1},
    {"complex64", "ComplexFloatStorage", 8},
    {"complex128", "ComplexDoubleStorage", 16},
    {"complex32", "", 4},
    {"uint16", "", 2},
    {"uint32", "", 4},
    {"uint64", "", 8},
    {"float8_e4m3fn", "", 1},
    {"float8_e4m3fnuz", "", 1},
    {"float8_e5m2", "", 1},
    {"float8_e5m2fnuz", "", 1},
    {"float8_e8m0fnu", "", 1},
    {"float4_e2m1fn_x2", "", 1},
    {"bits8", "", 1},
}};

constexpr const DTypeInfo& info(DType dtype) { return kDTypes.at(static_cast<unsigned char>(dtype)); }

constexpr DType dtype_by_name(std::string_view name) {
  for (size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  }
  return kUnknownDType;
}

constexpr DType dtype_by_storage(std::string_view storage) {
  if (storage.empty()) return kUnknownDType;
  for (size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].storage == storage) return static_cast<DType>(i);
  }
  return kUnknownDType;
}

}  // namespace dcp_fast::checkpoint
