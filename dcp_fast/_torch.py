"""All that is private in torch and used here, in one place: where a new torch is adapted to.

The public names of torch are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any, cast

import torch
from torch import _weights_only_unpickler as weights_only_unpickler
from torch._guards import detect_fake_mode
from torch._utils import _get_device_module as get_device_module
from torch._utils import _validate_loaded_sparse_tensors
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed._shard.sharded_tensor import metadata as shard_metadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint import _version as derived_version
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo as SafetensorsInfo
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint._storage_utils import _storage_setup as storage_setup
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import _wrap_exception as wrap_exception
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.filesystem import _StoragePrefix as StoragePrefix
from torch.distributed.checkpoint.filesystem import _StorageReaderTransforms as StorageReaderTransforms
from torch.distributed.checkpoint.logger import _dcp_method_logger as dcp_method_logger
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MEMORY_FORMAT_ENCODING
from torch.distributed.checkpoint.optimizer import _gen_rank_device as gen_rank_device
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list as create_chunk_list
from torch.distributed.checkpoint.planner_helpers import _create_read_items as create_read_items
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict as load_state_dict
from torch.distributed.checkpoint.utils import _api_bc_check as api_bc_check
from torch.distributed.checkpoint.utils import _DistWrapper as DistWrapper
from torch.distributed.checkpoint.utils import _get_failure_dict as get_failure_dict
from torch.distributed.distributed_c10d import _get_object_coll_device as get_object_coll_device
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.serialization import _get_layout
from torch.serialization import _is_zipfile as is_zipfile
from torch.serialization import _legacy_load as _load_legacy
from torch.serialization import _load as _load_archive
from torch.serialization import _serialization_tls as serialization_state

try:  # torch 2.14 lets a local shard carry the shape of its global tensor
    from torch.distributed.checkpoint.protocol import _is_checkpointable_tensor as is_checkpointable_tensor
except ImportError:

    def is_checkpointable_tensor(value: object) -> bool:
        """Whether a value carries the shape of a global tensor that it is a part of. Here none can."""
        return False


# A field of torch 2.15. Both classes of properties have it, or none.
PROPERTIES_HAVE_STRIDES = "strides" in ShardProperties.__dataclass_fields__

fsspec_filesystem: Any = None
for _name in ("fsspec_filesystem", "_fsspec_filesystem"):  # public since torch 2.15
    with suppress(ImportError):  # there is none without fsspec
        fsspec_filesystem = fsspec_filesystem or import_module(f"torch.distributed.checkpoint.{_name}")
# With the name that torch 2.15 gave it, or the earlier one.
FsspecFiles: Any = getattr(fsspec_filesystem, "_FileSystem", getattr(fsspec_filesystem, "FileSystem", None))

get_layout = cast(Callable[[str], torch.layout], _get_layout)
disabled_torch_function = torch._C._disabled_torch_function_impl
foreach_copy_ = torch._foreach_copy_
PyTorchFileReader = torch._C.PyTorchFileReader
storage_class: Callable[..., Any] = torch.storage.TypedStorage
rebuild_from_type: Callable[..., Any] = torch._tensor._rebuild_from_type_v2
tensor_rebuild_functions = cast(Callable[[], set[Any]], weights_only_unpickler._tensor_rebuild_functions)


# What torch.load(weights_only=True) ends with. Since torch 2.14 it is told so, as it then checks all sparse tensors.
validate_sparse_tensors: Callable[[], None] = _validate_loaded_sparse_tensors
if "weights_only" in signature(_validate_loaded_sparse_tensors).parameters:
    validate_sparse_tensors = partial(cast(Any, _validate_loaded_sparse_tensors), weights_only=True)
# What torch.load goes through, told the same. The argument makes no other difference.
load_archive, load_legacy = (
    partial(load, weights_only=True) if "weights_only" in signature(load).parameters else load
    for load in (_load_archive, _load_legacy)
)


def tensor_types() -> tuple[type, ...]:
    """Classes of tensors and storages, which take memory of any size when they are called with a number."""
    return (torch.Tensor, *torch._tensor_classes, *torch._storage_classes)


def makes_no_storages() -> bool:
    """Whether torch makes tensors without reading their elements, because of where it is called."""
    return serialization_state.skip_data or detect_fake_mode(None) is not None


def load_as_torch_does(unpickler: Any, map_location: str | None) -> Any:
    """What ``torch.serialization._load`` does with an unpickler that makes storages. It makes a class for each call."""
    before = serialization_state.map_location
    serialization_state.map_location = map_location
    try:
        result = unpickler.load()
    finally:
        serialization_state.map_location = before
    validate_sparse_tensors()
    return result


__all__ = [
    "MEMORY_FORMAT_ENCODING",
    "PROPERTIES_HAVE_STRIDES",
    "ChunkShardingSpec",
    "DistWrapper",
    "ExtensionRegistry",
    "FsspecFiles",
    "LocalShard",
    "PyTorchFileReader",
    "SafetensorsInfo",
    "ShardProperties",
    "ShardedTensor",
    "ShardedTensorMetadata",
    "StorageInfo",
    "StoragePrefix",
    "StorageReaderTransforms",
    "StridedShard",
    "api_bc_check",
    "create_chunk_list",
    "create_read_items",
    "dcp_method_logger",
    "derived_version",
    "detect_fake_mode",
    "disabled_torch_function",
    "flatten_state_dict",
    "foreach_copy_",
    "fsspec_filesystem",
    "gen_rank_device",
    "get_device_module",
    "get_failure_dict",
    "get_layout",
    "get_object_coll_device",
    "is_checkpointable_tensor",
    "is_zipfile",
    "load_archive",
    "load_as_torch_does",
    "load_legacy",
    "load_state_dict",
    "makes_no_storages",
    "narrow_tensor_by_index",
    "rebuild_from_type",
    "serialization_state",
    "set_element",
    "shard_metadata",
    "storage_class",
    "storage_setup",
    "tensor_rebuild_functions",
    "tensor_types",
    "unflatten_state_dict",
    "validate_sparse_tensors",
    "weights_only_unpickler",
    "wrap_exception",
]
