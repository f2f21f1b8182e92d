"""Bytes entries in the format of ``torch.save``, unpickled from memory: torch's own reader of archives takes as long
as all else."""

from __future__ import annotations

import io
from typing import Any

import torch
from typing_extensions import Buffer

from dcp_fast._torch import load_as_torch_does, storage_class
from dcp_fast.values.unpickler import Unpickler


def load_archive_natively(
    record: Buffer, size: int, pickle: bytes, storages: dict[str, tuple[int, int]], encoding: str
) -> Any:
    """What torch's loader of archives makes of an entry with the :class:`Unpickler`.

    Args:
        record: writable memory of the entry.
        size: of it in bytes.
        pickle, storages: as ``_native.find_archive`` found them in it.
        encoding: of texts that Python 2 wrote.
    """
    unpickler = _ArchiveUnpickler(record, size, pickle, storages, encoding)
    return load_as_torch_does(unpickler, None)


class _ArchiveUnpickler(Unpickler):
    def __init__(
        self, record: Buffer, size: int, pickle: bytes, storages: dict[str, tuple[int, int]], encoding: str
    ) -> None:
        sizes = {key: length for key, (_, length) in storages.items()}
        super().__init__(io.BytesIO(pickle), encoding=encoding, bounds=(size, sizes or {"": 0}))
        self._record = record
        self._places = storages
        self._made: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if "Storage" in name:
            try:
                return torch.serialization.StorageType(name)  # type: ignore[no-untyped-call]
            except KeyError:
                pass
        return super().find_class("torch._tensor" if module == "torch.tensor" else module, name)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, location, count = pid  # which load_binpersid has checked
        made = self._made.get(key)
        if made is not None:
            return made
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        location = location.decode("ascii") if type(location) is bytes else location
        storage: Any = torch.UntypedStorage(count * dtype.itemsize)  # type: ignore[no-untyped-call]
        if storage.nbytes():
            there = torch.frombuffer(
                self._record, dtype=torch.uint8, count=storage.nbytes(), offset=self._places[key][0]
            )
            torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).copy_(there)
        restored = torch.serialization.default_restore_location(storage, location)  # type: ignore[no-untyped-call]
        made = storage_class(wrap_storage=restored, dtype=dtype, _internal=True)
        if storage.nbytes():  # torch makes those of nothing anew
            self._made[key] = made
        return made
