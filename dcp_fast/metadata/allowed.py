"""The allow-list: every global that metadata written by DCP or by Megatron-Core may name, beside inert types.

The native reader has its own, of what it can read: csrc/metadata/names.cpp.
"""

from __future__ import annotations

import copyreg
import dataclasses
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint import planner as torch_planner

from dcp_fast._torch import MEMORY_FORMAT_ENCODING, StorageInfo, StoragePrefix, get_layout, shard_metadata
from dcp_fast.values.unpickler import find_inert, python3_name

# torch before 2.3 wrote the properties of another module.
PROPERTIES: dict[type, type] = {  # to the enum that its state must name
    torch_metadata.TensorProperties: MEMORY_FORMAT_ENCODING,
    shard_metadata.TensorProperties: shard_metadata.MEM_FORMAT_ENCODING,
}
ENUMS = frozenset({*PROPERTIES.values(), torch_planner.WriteItemType, torch_planner.LoadItemType})
# Plain records, whose state is a dict of their fields.
DATA_CLASSES: frozenset[type] = frozenset(
    {
        StorageInfo,
        StoragePrefix,
        torch_metadata.BytesStorageMetadata,
        torch_metadata.ChunkStorageMetadata,
        torch_metadata.Metadata,
        torch_metadata.MetadataIndex,
        torch_metadata.StorageMeta,
        torch_metadata.TensorStorageMetadata,
        torch_planner.BytesIOWriteData,
        torch_planner.LoadPlan,
        torch_planner.ReadItem,
        torch_planner.SavePlan,
        torch_planner.TensorWriteData,
        torch_planner.WriteItem,
    }
)
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

_ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in (*DATA_CLASSES, *PROPERTIES, *ENUMS)},
    # Subclasses with one more field, up to version 0.15. Without them, Megatron-Core need not be there.
    (_MEGATRON, "MCoreMetadata"): torch_metadata.Metadata,
    (_MEGATRON, "MCoreSavePlan"): torch_planner.SavePlan,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): get_layout,
    ("copyreg", "_reconstructor"): copyreg._reconstructor,  # type: ignore[attr-defined]
    **{("builtins", name.__name__): name for name in (dict, getattr, object)},
}


def find_allowed(module: str, name: str, protocol: int) -> Any:
    """The global, or None if it is not on the list. Below protocol 3 modules have the names of Python 2."""
    if protocol < 3:
        module, name = python3_name(module, name)
    if module == "torch" and "." not in name:
        dtype = vars(torch).get(name)
        if isinstance(dtype, torch.dtype):
            return dtype
    found = _ALLOWED.get((module, name))
    inert = find_inert(f"{module}.{name}") if found is None else None
    return found if inert is None else inert[0]


def has_field(module: str, name: str, field: str) -> bool:
    """Whether the class of this name has a field, in the torch that runs.

    Args:
        field: its name, or in the state of properties, which is a tuple, its place.
    """
    cls = _ALLOWED[module, name]
    if field.isdecimal():
        return len(dataclasses.fields(cls)) > int(field)
    return field in {each.name for each in dataclasses.fields(cls)}
