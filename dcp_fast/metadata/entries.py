"""What a lazy dict shows: objects of torch, made one by one from columns."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, Protocol, cast

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_fast import _native
from dcp_fast._torch import PROPERTIES_HAVE_STRIDES, StorageInfo, get_layout, shard_metadata

_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)


class Source(Protocol):
    """The content of a dict that is not made yet."""

    @property
    def columns(self) -> _native.MetadataColumns | None: ...

    keys_are_cheap: bool  # whether the keys can be listed without making an object for each value

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]:
        """The keys."""

    def __contains__(self, key: object) -> bool: ...
    def make(self, key: Any) -> Any:
        """The value of a key, made afresh. Raises KeyError."""

    def items(self) -> Iterator[tuple[Any, Callable[[], Any]]]:
        """Keys, each with what makes its value."""


class Entries:
    """``Metadata.state_dict_metadata``."""

    keys_are_cheap = True

    def __init__(self, columns: _native.MetadataColumns) -> None:
        self.columns = columns

    @cached_property
    def fqns(self) -> list[str]:
        return self.columns.fqns()

    def __len__(self) -> int:
        return self.columns.entry_count

    def __iter__(self) -> Iterator[str]:
        return iter(self.fqns)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.columns.find_entry(key) >= 0

    def make(self, key: str) -> STORAGE_TYPES:
        entry = self.columns.find_entry(key) if isinstance(key, str) else -1
        if entry < 0:
            raise KeyError(key)
        return self._make(entry)

    def items(self) -> Iterator[tuple[str, Callable[[], STORAGE_TYPES]]]:
        for entry, fqn in enumerate(self.fqns):
            yield fqn, partial(self._make, entry)

    def _make(self, entry: int) -> STORAGE_TYPES:
        fields = self.columns.entry_fields(entry)
        if fields is None:
            return BytesStorageMetadata()
        dtype, layout, requires_grad, memory_format, pin_memory, of_shard, size, strides = fields
        cls: Any = shard_metadata.TensorProperties if of_shard else TensorProperties
        properties = cls(
            dtype=self._dtype(entry, _native.METADATA_DTYPES[dtype]),
            layout=get_layout(_native.METADATA_LAYOUTS[layout]),
            requires_grad=requires_grad,
            memory_format=_MEMORY_FORMATS[memory_format],
            pin_memory=pin_memory,
            **({"strides": strides} if PROPERTIES_HAVE_STRIDES else {}),
        )
        rows: list[tuple[list[int], list[int]]] = cast(Any, self.columns.chunks(entry).tolist())
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in rows]
        return TensorStorageMetadata(properties, torch.Size(size), chunks)

    def _dtype(self, entry: int, name: str) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, name))


class StorageEntries:
    """``Metadata.storage_data`` as FileSystemWriter writes it."""

    keys_are_cheap = False

    def __init__(self, columns: _native.MetadataColumns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return self.columns.row_count

    def __iter__(self) -> Iterator[MetadataIndex]:
        for fqn, offset, index, *_ in map(self.columns.row, range(len(self))):
            yield MetadataIndex(fqn, offset, index)

    def _find(self, key: object) -> int:
        # As the class's own comparison: of the very same class, and whatever the index.
        if type(key) is not MetadataIndex or not isinstance(key.fqn, str):
            return -1
        try:
            return self.columns.find_row(key.fqn, key.offset)
        except TypeError:  # an offset of no numbers
            return -1

    def __contains__(self, key: object) -> bool:
        return self._find(key) >= 0

    def make(self, key: MetadataIndex) -> Any:
        row = self._find(key)
        if row < 0:
            raise KeyError(key)
        return self._info(row)

    def items(self) -> Iterator[tuple[MetadataIndex, Callable[[], Any]]]:
        for row, key in enumerate(self):
            yield key, partial(self._info, row)

    def _info(self, row: int) -> Any:
        return StorageInfo(*self.columns.row(row)[3:])


class Unpickled:
    """A dict that is unpickled as a whole when it is first looked at.

    Args:
        pickled: written by csrc/metadata/plain_pickle.cpp: plain values and paths only.
    """

    columns: _native.MetadataColumns | None = None
    keys_are_cheap = True

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    @cached_property
    def _dict(self) -> dict[Any, Any]:
        unpickled: dict[Any, Any] = pickle.loads(self._pickled)
        return unpickled

    def __len__(self) -> int:
        return len(self._dict)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dict)

    def __contains__(self, key: object) -> bool:
        return key in self._dict

    def make(self, key: Any) -> Any:
        return self._dict[key]

    def items(self) -> Iterator[tuple[Any, Callable[[], Any]]]:
        for key in self._dict:
            yield key, partial(self.make, key)
