"""Reads headers of safetensors files into columns: metadata as torch's HuggingFaceStorageReader makes it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dcp_fast import _native
from dcp_fast._torch import SafetensorsInfo
from dcp_fast.errors import UnsupportedDTypeError, typed_errors
from dcp_fast.metadata.entries import Entries, StorageEntries
from dcp_fast.metadata.lazy import LazyDict

SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"


def holds_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a local directory holds safetensors files, and no metadata of DCP's."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return ".metadata" not in names and any(name.endswith(SUFFIX) for name in names)


def read_headers(paths: Sequence[str], threads: int | None = None) -> Metadata:
    """The metadata of all safetensors files among some paths, as torch's HuggingFaceStorageReader makes it.

    Indexes among them are only compared with the files: torch loads what the files hold, whatever an index says.

    Args:
        paths: of the files of a directory, in the order in which torch reads them.
        threads: that read headers; None for the default.

    Raises:
        FileAccessError: a file cannot be read.
        FileMissingError: an index names a file that is not there.
        CorruptHeaderError: a header is damaged, or an index or another file contradicts it.
    """
    files = [path for path in paths if path.endswith(SUFFIX)]
    columns = read_columns(files, [path for path in paths if path.endswith(_INDEX_SUFFIX)], threads)
    return Metadata(LazyDict.of(_Tensors(columns)), storage_data=LazyDict.of(_Payloads(columns)))


def read_columns(
    files: Sequence[str], indexes: Sequence[str] = (), threads: int | None = None
) -> _native.MetadataColumns:
    """The same as columns. Raises as :func:`read_headers`."""
    with typed_errors():
        return _native.read_safetensors(list(files), list(indexes), threads or 0)


class _Tensors(Entries):
    """``Metadata.state_dict_metadata`` as torch's reader makes it, except where that knows no dtype."""

    def _dtype(self, entry: int, name: str) -> torch.dtype:
        return _known_dtype(name, self.fqns[entry])


class _Payloads(StorageEntries):
    """``Metadata.storage_data`` as torch's reader makes it."""

    def _info(self, row: int) -> SafetensorsInfo:
        path, _, _, code, sizes = self.columns.payload(row)
        dtype = _known_dtype(_native.METADATA_DTYPES[code], self.columns.row(row)[0])
        return SafetensorsInfo(path, torch.Size(sizes), dtype)


def _known_dtype(name: str, fqn: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedDTypeError(f"torch has no dtype {name}", fqn=fqn)
    return dtype
