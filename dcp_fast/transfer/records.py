"""Records: where they lie, and how Python reads those that the engine does not.

Python reads bytes entries, records that were stored with a transform such as zstd, and records that only ``torch.load``
can read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast._torch import StorageInfo, StorageReaderTransforms
from dcp_fast.errors import (
    CorruptCheckpointError,
    LoadError,
    OutOfMemoryError,
    UnknownTransformError,
    torch_load_error,
)
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.observe.report import LoadReport
from dcp_fast.observe.trace import span
from dcp_fast.transfer.archives import load_record
from dcp_fast.transfer.quantized_tensors import QuantizedTensor
from dcp_fast.transfer.record_rows import Place


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

    def path(self, file: str) -> str:
        return os.path.join(self.root, file)

    def stored_bytes(self, fqns: Iterable[str]) -> float:
        """How many bytes the records of some tensors and values take, those that this rank does not need included."""
        data, wanted = self.storage_data, set(fqns)
        if isinstance(data, LazyDict) and data.source is not None and data.source.columns is not None:
            return data.source.columns.stored_bytes(list(wanted))
        return float(sum(info.length for index, info in data.items() if index.fqn in wanted))

    def place(self, item: ReadItem) -> Place:
        """Where the record of an item lies."""
        info = self.storage_data[item.storage_index]
        return Place(info.relative_path, info.offset, info.length, bool(self._transforms_of(item)))

    def quantized(self, fqns: Sequence[str]) -> dict[int, QuantizedTensor]:
        """Which of some records are quantized, by their number.

        Args:
            fqns: of the records.

        Raises:
            LoadError: one is, and has no scales that fit.
        """
        return {}

    def read(self, item: ReadItem, layouts: _native.Layouts, record: int) -> io.BytesIO:
        """The bytes of an item's record, as they were before any transform.

        Args:
            item: of the record.
            layouts, record: where it lies.

        Raises:
            LoadError: they cannot be read, or a transform cannot be undone.
        """
        try:
            raw, requests, bytes_read = _native.read_record(layouts, record, self._options)
        except MemoryError as error:
            raise self.error(OutOfMemoryError, "out of memory for a record", item) from error
        self._report.requests += requests
        self._report.bytes_read += bytes_read
        return self._undo_transforms(item, io.BytesIO(raw))

    def _undo_transforms(self, item: ReadItem, raw: io.BytesIO) -> io.BytesIO:
        descriptors = self._transforms_of(item)
        try:
            stream = self._transforms.transform_load_stream(item, descriptors, cast(IO[bytes], raw))
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

    def _transforms_of(self, item: ReadItem) -> Sequence[str]:
        # Metadata of older versions of torch lacks the field.
        return self.storage_data[item.storage_index].transform_descriptors or ()

    def load_tensor(self, item: ReadItem, record: Buffer) -> torch.Tensor:
        """The whole stored tensor that an item is a box of, as ``torch.load(weights_only=True)`` makes it.

        Args:
            item: of the record.
            record: its bytes. They become those of the tensor.

        Raises:
            LoadError: the bytes are no record, or hold no tensor.
        """
        if type(self._transforms) is not StorageReaderTransforms or self._transforms_of(item):
            record = self._undo_transforms(item, io.BytesIO(record)).getbuffer()
        try:
            with span(self._options.recorder, "torch.load"):
                tensor = load_record(record)
        except LoadError as error:
            raise self.error(type(error), error.reason, item) from error.__cause__
        except Exception as error:
            raise self.error(*torch_load_error(error), item) from error
        if not isinstance(tensor, torch.Tensor):
            raise self.error(CorruptCheckpointError, f"a {type(tensor).__name__} where a tensor belongs", item)
        return tensor

    def error(self, cls: type[LoadError], reason: str, item: ReadItem) -> LoadError:
        """An error that names the record of an item."""
        file, offset, length, *_ = self.place(item)
        return cls(reason, self.path(file), item.storage_index.fqn, offset, length)
