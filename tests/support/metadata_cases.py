"""Metadata to read, and a pickle writer for what older versions of torch and of Python wrote."""

from __future__ import annotations

import importlib.util
import io
import pathlib
import pickle
import random
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from helpers import DTYPES
from torch.distributed._shard.sharded_tensor import metadata as shard_metadata
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcp_fast.metadata import read

__all__ = [
    "OldPickler",
    "assert_same_metadata",
    "make_metadata",
    "old_metadata",
    "parse_metadata",
    "pickled_by_later_torch",
    "random_metadata",
    "with_plans",
    "write_metadata",
]

# The benchmark's generator, by its path: the checkout must not be imported from here.
_spec = importlib.util.spec_from_file_location(
    "metadata_files", pathlib.Path(__file__).parents[2] / "benchmarks" / "metadata_files.py"
)
assert _spec is not None
assert _spec.loader is not None
_metadata_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_metadata_files)
write_metadata = _metadata_files.write_metadata


def parse_metadata(pickled: bytes, path: str) -> Metadata:
    """The metadata of a file with this content, which stays as it is."""
    return read.parse_metadata(pickled, path, lambda: pickled)


def chunk(offsets: list[int], sizes: list[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def make_metadata() -> Metadata:
    """One of everything that DCP writes."""
    entries: dict[str, Any] = {
        f"dtypes.{dtype}": TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size([2]), [chunk([0], [2])])
        for dtype in DTYPES
    }
    entries["sharded"] = TensorStorageMetadata(
        TensorProperties(torch.bfloat16, torch.strided, True, torch.channels_last, True),
        torch.Size([4, 1 << 40]),
        [chunk([0, 0], [2, 1 << 40]), chunk([2, 0], [2, 300]), chunk([2, 300], [2, (1 << 40) - 300])],
    )
    entries["scalar"] = TensorStorageMetadata(TensorProperties(), torch.Size([]), [chunk([], [])])
    entries["zero"] = TensorStorageMetadata(TensorProperties(), torch.Size([0, 3]), [chunk([0, 0], [0, 3])])
    entries["no chunks"] = TensorStorageMetadata(TensorProperties(), torch.Size([3]), [])
    entries["sparse"] = TensorStorageMetadata(TensorProperties(layout=torch.sparse_coo), torch.Size([3]), [])
    entries["preserved"] = TensorStorageMetadata(
        TensorProperties(memory_format=torch.preserve_format), torch.Size([3]), []
    )
    entries["value"] = BytesStorageMetadata()
    entries["schlüssel.🔑.\ud800.\\u0041\n"] = BytesStorageMetadata()
    planner_data: dict[str, Any] = {fqn: tuple(fqn.split(".")) for fqn in entries}
    planner_data["nested"] = ("a", 0, ("b", 1, (2, 3), []), {"c": [-(1 << 63), -5, None, True, "c"]})
    planner_data["shared"] = planner_data["nested"]
    storage: dict[Any, Any] = {}
    for number, (fqn, entry) in enumerate(entries.items()):
        for index, part in enumerate(getattr(entry, "chunks", [None])):
            key = MetadataIndex(fqn, part.offsets, index) if part else MetadataIndex(fqn)
            storage[key] = _StorageInfo(f"__{number % 3}_0.distcp", number << 33, 1000 + index)
    storage[MetadataIndex("value", [])] = _StorageInfo("dir/zstd", 5, 6, ["zstd"])
    storage[MetadataIndex("only in storage", [1, 2], 7)] = _StorageInfo("zstd", 5, 6, ("zstd", "other"))
    storage[MetadataIndex("sharded", [9, 9])] = _StorageInfo("", 0, 0, [])
    meta = StorageMeta(pathlib.Path("/some/where"), "save", None, ["a", "b"])
    return Metadata(entries, planner_data, storage, meta, "1.0.0")


def random_metadata(rng: random.Random) -> Metadata:
    """A few entries that are unlike each other."""
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for number in range(rng.randint(0, 5)):
        fqn = f"{'deep.' * rng.randint(0, 3)}k{number}"
        if rng.random() < 0.2:
            entries[fqn] = BytesStorageMetadata()
            storage[MetadataIndex(fqn)] = _StorageInfo("__0_0.distcp", rng.randrange(1 << 40), rng.randrange(1 << 20))
            continue
        size = [rng.choice([0, 1, 255, 256, 65535, 65536, 1 << 31, 1 << 62]) for _ in range(rng.randint(0, 5))]
        chunks = [chunk([rng.randint(0, n) for n in size], [rng.randint(0, n) for n in size]) for _ in range(3)]
        properties = TensorProperties(rng.choice(DTYPES), requires_grad=rng.random() < 0.5)
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(size), chunks[: rng.randint(0, 3)])
        for index, part in enumerate(chunks):
            descriptors = rng.choice([None, None, ["zstd"]])
            info = _StorageInfo(f"__{index}_0.distcp", rng.randrange(1 << 40), rng.randrange(1 << 20), descriptors)
            storage[MetadataIndex(fqn, part.offsets, rng.choice([None, index]))] = info
    planner_data = rng.choice([None, {fqn: tuple(fqn.split(".")) for fqn in entries}])
    meta = rng.choice([None, StorageMeta("id", "save")])
    return Metadata(entries, planner_data, storage, meta, rng.choice([None, "1.0.0"]))


# Older formats. What torch 2.0 to 2.12 wrote differs in fields and types; what Python 3.11 wrote, in enums.


class OldPickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Pickles today's objects as an older version did.

    Args:
        drop: fields that did not exist yet, by class.
        all_fields: write fields that are None, as ``_StorageInfo`` did before it had a ``__getstate__``.
        enums_by_name: write members of enums as Python 3.11 did, by ``getattr``.
    """

    def __init__(
        self,
        file: io.BytesIO,
        protocol: int,
        *,
        drop: dict[type, set[str]],
        all_fields: bool = False,
        enums_by_name: bool = False,
    ) -> None:
        super().__init__(file, protocol)
        self.drop = drop
        self.all_fields = all_fields
        self.enums_by_name = enums_by_name

    def reducer_override(self, value: Any) -> Any:
        cls = type(value)
        if cls in (torch_metadata._MEM_FORMAT_ENCODING, shard_metadata.MEM_FORMAT_ENCODING):
            return (getattr, (cls, value.name)) if self.enums_by_name else (cls, (value.value,))
        if cls in self.drop or (cls is _StorageInfo and self.all_fields):
            state = {name: field for name, field in vars(value).items() if name not in self.drop.get(cls, ())}
            make: Callable[..., Any] = value.__reduce_ex__(self.proto)[0]
            return make, value.__reduce_ex__(self.proto)[1], state
        return NotImplemented


def old_metadata(metadata: Metadata, protocol: int, version: str) -> bytes:
    """The pickle of metadata, which is changed, as a version of torch wrote it; fields that it lacked are lost."""
    without_meta = {Metadata: {"storage_meta", "version"}, _StorageInfo: {"transform_descriptors"}}
    options: dict[str, Any] = {
        "2.0": {"drop": without_meta},
        "2.3": {"drop": {Metadata: {"version"}, StorageMeta: {"modules"}, _StorageInfo: {"transform_descriptors"}}},
        "2.6": {"drop": {Metadata: {"version"}}, "all_fields": True},
        "Python 3.11": {"drop": {}, "enums_by_name": True},
        "2.0, Python 3.11": {"drop": without_meta, "enums_by_name": True},
    }[version]
    if version.startswith("2.0"):
        # Before torch 2.3 the properties were of the class of torch.distributed._shard.
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties = shard_metadata.TensorProperties(**vars(entry.properties))  # type: ignore[assignment]
    stream = io.BytesIO()
    OldPickler(stream, protocol, **options).dump(metadata)
    return stream.getvalue()


def with_plans(metadata: Metadata) -> Metadata:
    """The metadata with what Megatron-Core 0.16 sets on it, which shares objects with torch's own fields."""
    plans = []
    for rank in range(3):
        items = []
        for fqn, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                items.append(WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO, BytesIOWriteData(7)))
                continue
            for part in entry.chunks[rank : rank + 1]:
                data = TensorWriteData(part, TensorProperties(entry.properties.dtype), entry.size)
                index = MetadataIndex(fqn, part.offsets, rank)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items, _StoragePrefix(f"__{rank}_"), {}))
    vars(metadata)["mcore_data"] = {
        fqn: {"nd_reformulated_orig_global_shape": (2, 3, rank)}
        for rank, fqn in enumerate(metadata.state_dict_metadata)
    }
    vars(metadata)["all_local_plans"] = plans
    return metadata


class LaterPickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Pickles today's objects as a later torch does.

    Args:
        strides: makes the sixth part of the state of properties, or None for as many parts as this torch has.
        more: the fields that objects of a class have behind theirs.
        names: another module and name for a class.
    """

    def __init__(
        self,
        file: io.BytesIO,
        protocol: int,
        *,
        strides: Callable[[Any], Any] | None = None,
        more: dict[type, dict[str, Any]] | None = None,
        names: dict[type, tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(file, protocol)
        self.strides = strides
        self.more = more or {}
        self.names = names or {}

    def reducer_override(self, value: Any) -> Any:
        cls = type(value)
        if isinstance(value, type):
            return NotImplemented
        if cls in (TensorProperties, shard_metadata.TensorProperties) and self.strides is not None:
            make, arguments, state = value.__reduce_ex__(self.proto)[:3]
            return make, arguments, (*state[:5], *self.strides(value))
        if cls in self.more:
            make, arguments, state = value.__reduce_ex__(self.proto)[:3]
            return make, arguments, {**(state or {}), **self.more[cls]}
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in self.names:
            super().save_global(obj, name)
            return
        # As pickle does, which looks whether the module has the class.
        module, name = self.names[obj]
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]
    dispatch[type] = save_global


def pickled_by_later_torch(metadata: Metadata, protocol: int = 4, **options: Any) -> bytes:
    stream = io.BytesIO()
    LaterPickler(stream, protocol, **options).dump(metadata)
    return stream.getvalue()


def assert_same_metadata(ours: Metadata, theirs: Metadata) -> None:
    """Equal in both directions, in the same order, and of the same types inside."""
    assert list(ours.state_dict_metadata) == list(theirs.state_dict_metadata)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert theirs.storage_data == ours.storage_data
    if theirs.storage_data is not None:
        assert [repr(key) for key in ours.storage_data] == [repr(key) for key in theirs.storage_data]
    assert repr(ours.planner_data) == repr(theirs.planner_data)
    assert repr(ours.state_dict_metadata) == repr(theirs.state_dict_metadata)
    assert repr(ours.storage_data) == repr(theirs.storage_data)
    assert type(ours) is type(theirs) is Metadata
    assert ours == theirs
    assert theirs == ours
