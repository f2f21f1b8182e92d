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

// What Python makes by inert.py and arrays.py, and enums and devices of torch; long, unicode and xrange are int, str
// and range to Python 2. In the order of their names.
constexpr std::array<std::string_view, 44> kInertGlobals = {
    "_codecs.encode",
    "_io.BytesIO",
    "argparse.Namespace",
    "builtins.Ellipsis",
    "builtins.bool",
    "builtins.bytearray",
    "builtins.bytes",
    "builtins.complex",
    "builtins.float",
    "builtins.frozenset",
    "builtins.int",
    "builtins.list",
    "builtins.long",
    "builtins.range",
    "builtins.set",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "builtins.unicode",
    "builtins.xrange",
    "collections.Counter",
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.deque",
    "datetime.date",
    "datetime.datetime",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "fractions.Fraction",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
    "torch.distributed.checkpoint.planner.LoadItemType",
    "torch.distributed.checkpoint.planner.WriteItemType",
    "types.SimpleNamespace",
    "uuid.UUID",
};

bool is_inert(std::string_view module, std::string_view name) {
  const auto is_it = [&](std::string_view known) {
    return known.size() == module.size() + 1 + name.size() && known.substr(0, module.size()) == module &&
           known[module.size()] == '.' && known.substr(module.size() + 1) == name;
  };
  return std::any_of(kInertGlobals.begin(), kInertGlobals.end(), is_it);
}

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
  if (is_inert(modern, name)) return Value(Tag::kGlobal, static_cast<uint64_t>(Global::kInert));
  return std::nullopt;
}

}  // namespace dcp_fast::metadata
