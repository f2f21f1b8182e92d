#include "metadata/names.h"

#include <algorithm>

#include "checkpoint/dtype.h"

namespace dcp_fast::metadata {

namespace {

struct KnownGlobal {
  std::string_view module;
  std::string_view name;
  Global global;
};

constexpr std::string_view kCheckpoint = "torch.distributed.checkpoint.metadata";
constexpr std::string_view kFileSystem = "torch.distributed.checkpoint.filesystem";
constexpr std::string_view kMegatron = "megatron.core.dist_checkpointing.strategies.torch";
constexpr std::string_view kShard = "torch.distributed._shard.sharded_tensor.metadata";

constexpr std::array<KnownGlobal, 20> kGlobals = {{
    {kCheckpoint, "Metadata", Global::kMetadata},
    {kMegatron, "MCoreMetadata", Global::kMetadata},  // a subclass, of version 0.15
    {kCheckpoint, "TensorStorageMetadata", Global::kTensorStorageMetadata},
    {kCheckpoint, "BytesStorageMetadata", Global::kBytesStorageMetadata},
    {kCheckpoint, "ChunkStorageMetadata", Global::kChunkStorageMetadata},
    {kCheckpoint, "MetadataIndex", Global::kMetadataIndex},
    {kCheckpoint, "StorageMeta", Global::kStorageMeta},
    {kCheckpoint, "TensorProperties", Global::kTensorProperties},
    {kCheckpoint, "_MEM_FORMAT_ENCODING", Global::kMemoryFormat},
    {kFileSystem, "_StorageInfo", Global::kStorageInfo},
    {kShard, "TensorProperties", Global::kShardTensorProperties},
    {kShard, "MEM_FORMAT_ENCODING", Global::kShardMemoryFormat},
    {"torch", "Size", Global::kSize},
    {"torch.serialization", "_get_layout", Global::kGetLayout},
    {"builtins", "getattr", Global::kGetattr},
    {"builtins", "dict", Global::kDict},
    {"pathlib", "PosixPath", Global::kPosixPath},
    {"pathlib", "PurePosixPath", Global::kPurePosixPath},
    {"pathlib", "WindowsPath", Global::kPureWindowsPath},
    {"pathlib", "PureWindowsPath", Global::kPureWindowsPath},
}};

const KnownGlobal& known(Global global) {
  return *std::find_if(kGlobals.begin(), kGlobals.end(), [&](const auto& entry) { return entry.global == global; });
}

// The module's name in Python 3.12, where pathlib was still one module.
std::string_view modern_module(std::string_view module, int protocol) {
  if (module == "pathlib._local") return "pathlib";
  if (protocol < 3 && module == "__builtin__") return "builtins";
  if (protocol < 3 && module == "copy_reg") return "copyreg";
  return module;
}

}  // namespace

static_assert(kDTypeNames.size() >= checkpoint::kDTypes.size());

std::string_view module_of(Global global) { return known(global).module; }
std::string_view name_of(Global global) { return known(global).name; }

std::optional<Value> find_global(std::string_view module, std::string_view name, int protocol) {
  const std::string_view modern = modern_module(module, protocol);
  for (const KnownGlobal& entry : kGlobals) {
    if (entry.name == name && entry.module == modern) {
      return Value(Tag::kGlobal, static_cast<uint64_t>(entry.global));
    }
  }
  if (module == "torch") {
    if (const auto code = code_of(kDTypeNames, name)) return Value(Tag::kDType, *code);
  }
  return std::nullopt;
}

}  // namespace dcp_fast::metadata
