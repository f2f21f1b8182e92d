"""Records: where they lie, and how Python reads those that the engine does not.

Python reads bytes entries, records that were stored with a transform such as zstd, and records that only ``torch.load``
can read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from dcp_fast import _native
from dcp_fast._torch import StorageInfo, StorageReaderTransforms
from dcp_fast.errors import (
    CorruptCheckpointError,
    LoadError,
    OutOfMemoryError,
    UnknownTransformError,
    torch_load_error,
    typed_errors,
)
from dcp_fast.observe.report import LoadReport
from dcp_fast.observe.trace import span

__all__ = ["Records"]


class Records:
    """The records of one checkpoint.

    Args:
        root: directory of the checkpoint.
        storage_data: as in ``Metadata``: index of a chunk or bytes entry to the file, offset and length of its record.
        transforms: torch's, which undo what extensions did to a record.
        options: of the native engine.
        report: counts what is read here.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        storage_data: Mapping[MetadataIndex, StorageInfo],
        transforms: StorageReaderTransforms,
        options: _native.Options,
        report: LoadReport,
    ) -> None:
        self.root = root
        self.storage_data = storage_data
        self._transforms = transforms
        self._options = options
        self._report = report

    def path(self, relative_path: str) -> str:
        return os.path.join(self.root, relative_path)

    def read(self, item: ReadItem) -> io.BytesIO:
        """The bytes of an item's record, as they were before any transform.

        Raises:
            LoadError: they cannot be read, or a transform cannot be undone.
        """
        info = self.storage_data[item.storage_index]
        path = self.path(info.relative_path)
        try:
            with typed_errors():
                raw, requests = _native.read_range(path, info.offset, info.length, self._options)
        except LoadError as error:
            where = (info.offset, info.length) if error.offset is None else (error.offset, error.length)
            raise type(error)(
                error.reason, error.path or path, item.storage_index.fqn, *where, error.error_number
            ) from None
        self._report.requests += requests
        self._report.bytes_read += info.length
        # Metadata of older versions of torch lacks the field.
        descriptors = info.transform_descriptors or ()
        try:
            stream = self._transforms.transform_load_stream(item, descriptors, cast(IO[bytes], io.BytesIO(raw)))
        except ValueError as error:
            raise self.error(UnknownTransformError, str(error), item) from error
        if isinstance(stream, io.BytesIO):
            return stream
        try:
            return io.BytesIO(stream.read(-1))
        except MemoryError as error:
            raise self.error(OutOfMemoryError, f"out of memory to undo {list(descriptors)}", item) from error
        except Exception as error:
            raise self.error(CorruptCheckpointError, f"cannot undo {list(descriptors)}: {error}", item) from error

    def load_tensor(self, item: ReadItem) -> torch.Tensor:
        """The whole stored tensor that an item is a box of, read by ``torch.load(weights_only=True)``.

        Raises:
            LoadError: the record cannot be read, or holds no tensor.
        """
        record = self.read(item)
        try:
            with span(self._options.recorder, "torch.load"):
                tensor = torch.load(record, map_location="cpu", mmap=False, weights_only=True)
        except LoadError:
            raise
        except Exception as error:
            raise self.error(*torch_load_error(error), item) from error
        if not isinstance(tensor, torch.Tensor):
            raise self.error(CorruptCheckpointError, f"a {type(tensor).__name__} where a tensor belongs", item)
        return tensor

    def error(self, cls: type[LoadError], reason: str, item: ReadItem) -> LoadError:
        """An error that names the record of an item."""
        info: Any = self.storage_data[item.storage_index]
        return cls(reason, self.path(info.relative_path), item.storage_index.fqn, info.offset, info.length)
