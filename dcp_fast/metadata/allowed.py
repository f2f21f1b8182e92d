"""The allow-list: every global that metadata written by DCP may name.

The native reader has its own, of what it can read: csrc/metadata/names.cpp.
"""

from __future__ import annotations

import codecs
import collections
import copyreg
import pathlib
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata

from dcp_fast._torch import MEMORY_FORMAT_ENCODING, StorageInfo, get_layout, shard_metadata

__all__ = ["DATA_CLASSES", "ENUMS", "PATHS", "PROPERTIES", "find_allowed"]

# torch before 2.3 wrote the properties of another module.
PROPERTIES: dict[type, type] = {  # to the enum that its state must name
    torch_metadata.TensorProperties: MEMORY_FORMAT_ENCODING,
    shard_metadata.TensorProperties: shard_metadata.MEM_FORMAT_ENCODING,
}
ENUMS = frozenset(PROPERTIES.values())
# Plain records, whose state is a dict of their fields.
DATA_CLASSES: frozenset[type] = frozenset(
    {
        StorageInfo,
        torch_metadata.BytesStorageMetadata,
        torch_metadata.ChunkStorageMetadata,
        torch_metadata.Metadata,
        torch_metadata.MetadataIndex,
        torch_metadata.StorageMeta,
        torch_metadata.TensorStorageMetadata,
    }
)
PATHS: frozenset[type] = frozenset({pathlib.PosixPath, pathlib.PurePosixPath})

_ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in (*DATA_CLASSES, *PROPERTIES, *ENUMS)},
    **{("pathlib", cls.__name__): cls for cls in PATHS},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): get_layout,
    ("copyreg", "_reconstructor"): copyreg._reconstructor,  # type: ignore[attr-defined]
    ("_codecs", "encode"): codecs.encode,  # bytes below protocol 3
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("builtins", name.__name__): name for name in (complex, dict, frozenset, getattr, object, set)},
}


def find_allowed(module: str, name: str, protocol: int) -> Any:
    """The global, or None if it is not on the list. Below protocol 3 modules have the names of Python 2."""
    if module == "pathlib._local":  # of Python 3.13
        module = "pathlib"
    elif protocol < 3:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    if module == "torch" and "." not in name:
        dtype = vars(torch).get(name)
        if isinstance(dtype, torch.dtype):
            return dtype
    return _ALLOWED.get((module, name))
