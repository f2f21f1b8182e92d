// The allow-list: every global that metadata written by DCP may name, and the codes for what they stand for. Python's
// list, dcp_fast/metadata/allowed.py, has more: what is left to its unpickler.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "metadata/value.h"

namespace dcp_fast::metadata {

enum class Global : uint8_t {
  kMetadata,
  kTensorStorageMetadata,
  kBytesStorageMetadata,
  kChunkStorageMetadata,
  kMetadataIndex,
  kStorageMeta,
  kStorageInfo,
  kTensorProperties,       // of torch.distributed.checkpoint
  kShardTensorProperties,  // of torch.distributed._shard, which DCP wrote before torch 2.3
  kMemoryFormat,           // the enum that belongs to the one
  kShardMemoryFormat,      // and to the other
  kSize,
  kGetLayout,
  kGetattr,  // what Python 3.11 makes members of enums with
  kDict,
  kPosixPath,
  kPurePosixPath,
  kPureWindowsPath,  // a path of Windows, which only there could be more than pure
  kInert,            // what makes values of inert types, or is one: see dcp_fast/values/inert.py
};

enum class MemoryFormat : uint8_t { kContiguous, kChannelsLast, kPreserve };

// Names of torch's dtypes; a code is an index. The first are those of checkpoint/dtype.h, with the same codes. The last
// two are what safetensors files may hold and no torch has yet.
inline constexpr std::array<std::string_view, 49> kDTypeNames = {
    "float32",        "float64",
    "float16",        "bfloat16",
    "int64",          "int32",
    "int16",          "int8",
    "uint8",          "bool",
    "complex64",      "complex128",
    "complex32",      "uint16",
    "uint32",         "uint64",
    "float8_e4m3fn",  "float8_e4m3fnuz",
    "float8_e5m2",    "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2",
    "bits8",          "bits16",
    "bits1x8",        "bits2x4",
    "bits4x2",        "quint8",
    "qint8",          "qint32",
    "quint4x2",       "quint2x4",
    "int1",           "int2",
    "int3",           "int4",
    "int5",           "int6",
    "int7",           "uint1",
    "uint2",          "uint3",
    "uint4",          "uint5",
    "uint6",          "uint7",
    "bcomplex32",     "float6_e2m3fn",
    "float6_e3m2fn",
};

// As str() writes them; a code is an index.
inline constexpr std::array<std::string_view, 8> kLayoutNames = {
    "torch.strided",    "torch.sparse_coo", "torch.sparse_csr", "torch.sparse_csc",
    "torch.sparse_bsr", "torch.sparse_bsc", "torch._mkldnn",    "torch.jagged",
};

// In the order of MemoryFormat.
inline constexpr std::array<std::string_view, 3> kMemoryFormatNames = {
    "TORCH_CONTIGUOUS_FORMAT",
    "TORCH_CHANNELS_LAST",
    "TORCH_PRESERVE_FORMAT",
};

// kGlobal or kDType; nullopt for what is not on the list. `protocol`: below 3 modules have the names of Python 2.
std::optional<Value> find_global(std::string_view module, std::string_view name, int protocol);

// What a class is called.
std::string_view module_of(Global global);
std::string_view name_of(Global global);

template <size_t count>
std::optional<uint8_t> code_of(const std::array<std::string_view, count>& names, std::string_view name) {
  for (size_t i = 0; i < count; ++i) {
    if (names[i] == name) return static_cast<uint8_t>(i);
  }
  return std::nullopt;
}

}  // namespace dcp_fast::metadata
