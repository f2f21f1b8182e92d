"""Tensors in records that only torch can read, unpickled from memory without a copy of their storages."""

from __future__ import annotations

import io
from typing import Any, cast

import torch
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast._torch import load_as_torch_does, makes_no_storages, storage_class, weights_only_unpickler
from dcp_fast.errors import CorruptCheckpointError, LoadError

_CPU = "cpu"
_MOST_ALIGNED = 16  # bytes: no dtype asks for more


def load_record(record: Buffer) -> Any:
    """What ``torch.load(map_location="cpu", weights_only=True)`` makes of a record.

    Args:
        record: writable memory, which the storages of the result keep and share.

    Raises:
        CorruptCheckpointError: the pickle asks for a storage that is larger than what the archive has for it.
        Exception: whatever ``torch.load`` raises.
    """
    archive = None if makes_no_storages() else _native.find_archive(record)
    if archive is not None:
        try:
            return _load_archive(record, *archive)
        except LoadError:
            raise
        except Exception:  # torch.load has the words for it
            pass
    return torch.load(io.BytesIO(record), map_location=_CPU, mmap=False, weights_only=True)


def _load_archive(record: Buffer, pickle: bytes, storages: dict[str, tuple[int, int]]) -> Any:
    return load_as_torch_does(_Unpickler(pickle, record, storages), _CPU)


class _Unpickler(cast(Any, weights_only_unpickler.Unpickler)):  # type: ignore[misc]
    """torch's own restricted unpickler, which decides what a pickle may call."""

    def __init__(self, pickle: bytes, record: Buffer, storages: dict[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(pickle), encoding="utf-8")
        self._record = torch.frombuffer(record, dtype=torch.uint8).untyped_storage()
        self._places = storages
        self._made: dict[str, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        storage = self._made.get(key)
        if storage is None:
            storage = self._made[key] = storage_class(
                wrap_storage=self._bytes_of(key, count * dtype.itemsize), dtype=dtype, _internal=True
            )
        if storage.dtype != dtype:
            raise ValueError("a storage of two dtypes, which each torch takes in its own way")
        return storage

    def _bytes_of(self, key: str, size: int) -> torch.UntypedStorage:
        begin, there = self._places[key]
        if not 0 <= size <= there:
            raise CorruptCheckpointError(f"data.pkl says {size} bytes of storage, the archive holds {there}")
        storage: Any = self._record[begin : begin + size]
        is_aligned = storage.data_ptr() % _MOST_ALIGNED == 0
        return cast(torch.UntypedStorage, storage if is_aligned else storage.clone())
