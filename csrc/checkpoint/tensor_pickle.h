// Reads the pickle of one plain tensor, as torch.save writes it, and executes nothing.
// Opcodes: CPython's Lib/pickletools.py. Rebuild functions: torch/_utils.py (_rebuild_tensor_v2, _rebuild_tensor_v3,
// _rebuild_parameter); the persistent id of a storage: torch/serialization.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/bytes.h"
#include "checkpoint/dtype.h"

namespace dcp_fast::checkpoint {

struct PickledTensor {
  DType dtype = kUnknownDType;
  std::string storage_key;     // the entry data/<key> holds the bytes
  int64_t storage_bytes = 0;   // of that entry
  int64_t storage_offset = 0;  // elements
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // elements
};

// nullopt: anything but a plain strided CPU tensor or parameter (a subclass, a quantized, sparse or lazily conjugated
// tensor, hooks, other objects, or damage). Sizes and strides are as written: not negative, but not checked against the
// storage.
std::optional<PickledTensor> parse_tensor_pickle(Bytes pickle);

}  // namespace dcp_fast::checkpoint
