"""What a checkpoint holds, told from its metadata alone: from columns if it was read into some, else from objects."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, StorageMeta

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.errors import CorruptMetadataError
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.metadata.read import read_metadata
from dcp_fast.metadata.safetensors import SUFFIX, holds_safetensors, read_headers

_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True)
class Chunk:
    """A chunk of a tensor, or a whole bytes entry, and its record.

    Attributes:
        offsets, sizes: of the chunk in its tensor, in elements. None for a bytes entry.
        file, offset, length: the file of the record in the checkpoint's folder, and the byte range in it. None if the
            metadata knows no record.
        transforms: descriptors of the transforms that the record was stored with, as torch's extensions write them.
    """

    offsets: list[int] | None
    sizes: list[int] | None
    file: str | None = None
    offset: int | None = None
    length: int | None = None
    transforms: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A tensor or a bytes entry.

    Attributes:
        fqn: its key in the flattened state dict.
        dtype, layout, shape: such as ``"float32"``, ``"strided"``, ``[4, 3]``. None for a bytes entry.
        chunk_count: a bytes entry counts as one.
        payload_bytes: of the elements of all chunks. None for a bytes entry.
        record_bytes: of all records: their payloads and what encloses them.
        file_count: how many files hold a part of it.
        missing_records: how many chunks the metadata knows no record of.
        chunks: None unless :func:`inspect` was asked for them.
    """

    fqn: str
    dtype: str | None
    layout: str | None
    shape: list[int] | None
    chunk_count: int
    payload_bytes: int | None
    record_bytes: int
    file_count: int
    missing_records: int
    chunks: list[Chunk] | None = None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: the metadata file, or for safetensors files their folder or the one file.
        version: of the metadata's format, None if it says none.
        storage_meta: ``checkpoint_id``, ``save_id`` and ``modules``, as the metadata has them; None if it has none.
        tensors, bytes_entries, chunks, files: how many there are. Chunks are those of tensors.
        missing_records: how many chunks and bytes entries no file is known for.
        payload_bytes, payload_bytes_by_dtype: of the elements of all chunks.
        record_bytes: of all records: their payloads and what encloses them.
        entries: those that were selected, in the order of the metadata.
    """

    path: str
    version: str | None
    storage_meta: dict[str, Any] | None
    tensors: int
    bytes_entries: int
    chunks: int
    missing_records: int
    files: int
    payload_bytes: int
    payload_bytes_by_dtype: dict[str, int]
    record_bytes: int
    entries: list[Entry]


def inspect(path: str | os.PathLike[str], fqn: str | None = None, *, trust_metadata: bool = False) -> Inspection:
    """Tell what a checkpoint holds. Only its metadata is read, and nothing that it names is run.

    Args:
        path: of its folder, of a metadata file, or of a safetensors file.
        fqn: an FQN, or a shell pattern such as ``"*.bias"``. ``entries`` has those that it matches, with their chunks:
            offsets, sizes and byte ranges. None: all entries, without chunks.
        trust_metadata: unpickle the metadata as torch does, which runs whatever code it names.

    Raises:
        OSError: as the file system does.
        CorruptMetadataError: the file is damaged; CorruptHeaderError: a safetensors file is.
        UntrustedMetadataError: it asks for what could run code.
    """
    file = find_metadata_file(path)
    with paused_collection():
        metadata = read_metadata_file(file, trust_metadata)
        columns = columns_of(metadata)
        source: _Source = _Objects(metadata, str(file)) if columns is None else _Columns(columns)
        entries = list(source.entries())
        selected = entries
        if fqn is not None:
            selected = [
                replace(entry, chunks=source.chunks(number))
                for number, entry in enumerate(entries)
                if entry.fqn == fqn or fnmatchcase(entry.fqn, fqn)
            ]
    by_dtype: dict[str, int] = {}
    for entry in entries:
        if entry.dtype is not None:
            by_dtype[entry.dtype] = by_dtype.get(entry.dtype, 0) + (entry.payload_bytes or 0)
    tensors = [entry for entry in entries if entry.dtype is not None]
    return Inspection(
        path=str(file),
        version=None if metadata.version is None else str(metadata.version),
        storage_meta=_plain_storage_meta(metadata.storage_meta),
        tensors=len(tensors),
        bytes_entries=len(entries) - len(tensors),
        chunks=sum(entry.chunk_count for entry in tensors),
        missing_records=sum(entry.missing_records for entry in entries),
        files=source.file_count(),
        payload_bytes=sum(by_dtype.values()),
        payload_bytes_by_dtype=dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
        record_bytes=sum(entry.record_bytes for entry in entries),
        entries=selected,
    )


def find_metadata_file(path: str | os.PathLike[str]) -> Path:
    """The metadata file of a checkpoint's folder; anything else, such as safetensors files, is returned as it is."""
    file = Path(path)
    return file / ".metadata" if file.is_dir() and not holds_safetensors(file) else file


def read_metadata_file(file: Path, trust_metadata: bool) -> Metadata:
    """The metadata of what :func:`find_metadata_file` found. Arguments and errors are those of :func:`inspect`."""
    if file.is_dir():
        return read_headers([str(path) for path in file.iterdir()])
    if file.suffix == SUFFIX:
        return read_headers([str(file)])
    if not trust_metadata:
        return read_metadata(str(file))
    pickled = file.read_bytes()
    try:
        metadata = pickle.loads(pickled)
    except MemoryError:
        raise
    except Exception as error:
        reason = f"the metadata cannot be unpickled: {type(error).__name__}: {error}"
        raise CorruptMetadataError(reason, str(file)) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CorruptMetadataError("the file holds something else than Metadata", str(file))
    return metadata


def _plain_storage_meta(meta: StorageMeta | None) -> dict[str, Any] | None:
    if meta is None:
        return None
    values = {name: getattr(meta, name, None) for name in ("checkpoint_id", "save_id")}
    plain: dict[str, Any] = {name: None if value is None else str(value) for name, value in values.items()}
    return {**plain, "modules": [str(module) for module in getattr(meta, "modules", None) or ()]}


class _Source(Protocol):
    def entries(self) -> Iterator[Entry]: ...
    def chunks(self, number: int) -> list[Chunk]:
        """Of the entry of this number."""

    def file_count(self) -> int: ...


class _Columns:
    """From columns, without an object for each chunk."""

    def __init__(self, columns: _native.MetadataColumns) -> None:
        self._columns = columns
        self._fqns = columns.fqns()
        self._files = columns.files()

    def file_count(self) -> int:
        return len(self._files)

    def entries(self) -> Iterator[Entry]:
        columns, files, lengths = self._columns, self._columns.row_files, self._columns.row_lengths
        for number, fqn in enumerate(self._fqns):
            fields = columns.entry_fields(number)
            rows = self._rows(number)
            found = [row for row in rows if row >= 0]
            dtype = layout = shape = payload_bytes = None
            if fields is not None:
                dtype, layout, shape = (
                    _native.METADATA_DTYPES[fields[0]],
                    _native.METADATA_LAYOUTS[fields[1]],
                    fields[6],
                )
                payload_bytes = (
                    sum([lengths[row] for row in rows])  # torch may have no such dtype
                    if columns.has_payloads
                    else _elements(columns.chunks(number)) * getattr(torch, dtype).itemsize
                )
            yield Entry(
                fqn,
                dtype,
                None if layout is None else layout.removeprefix("torch."),
                None if shape is None else list(shape),
                chunk_count=len(rows),
                payload_bytes=payload_bytes,
                record_bytes=sum([lengths[row] for row in found]),
                file_count=len({files[row] for row in found}),
                missing_records=len(rows) - len(found),
            )

    def chunks(self, number: int) -> list[Chunk]:
        is_tensor = self._columns.entry_fields(number) is not None
        boxes: Any = self._columns.chunks(number).tolist() if is_tensor else [(None, None)]
        chunks = []
        for (offsets, sizes), row in zip(boxes, self._rows(number), strict=True):
            if row < 0:
                chunks.append(Chunk(offsets, sizes))
                continue
            *_, file, offset, length, transforms = self._columns.row(row)
            if self._columns.has_payloads:
                file = os.path.basename(file)
            chunks.append(Chunk(offsets, sizes, file, offset, length, list(transforms or ())))
        return chunks

    def _rows(self, number: int) -> list[int]:
        """The row of each chunk, -1 where there is none."""
        if self._columns.entry_fields(number) is None:
            return [self._columns.find_row(self._fqns[number], None)]
        count = len(self._columns.chunks(number))
        return list(map(partial(self._columns.row_of_chunk, number), range(count)))


def _elements(chunks: memoryview) -> int:
    """How many elements all chunks have. Their sizes may be absurd: only Python's numbers hold any product."""
    assert chunks.shape is not None
    count, _, dims = chunks.shape
    if count == 0 or dims == 0:
        return count
    numbers = chunks.cast("B").cast("q")
    volumes: Sequence[int] = numbers[dims :: 2 * dims].tolist()
    for dim in range(1, dims):
        volumes = list(map(mul, volumes, numbers[dims + dim :: 2 * dims].tolist()))
    return sum(volumes)


class _Objects:
    """From objects, which may hold anything where a pickle did not come from DCP."""

    def __init__(self, metadata: Metadata, path: str) -> None:
        self._metadata = metadata.state_dict_metadata
        storage = metadata.storage_data
        self._storage: dict[Any, Any] = storage if isinstance(storage, dict) else {}
        self._path = path
        self._fqns = [self._text(fqn) for fqn in self._metadata]

    def file_count(self) -> int:
        return len({self._text(self._field(info, "relative_path")) for info in self._storage.values()})

    def entries(self) -> Iterator[Entry]:
        for number, fqn in enumerate(self._fqns):
            chunks = self.chunks(number)
            found = [chunk for chunk in chunks if chunk.file is not None]
            dtype = layout = shape = payload_bytes = None
            entry = self._metadata[fqn]
            if not isinstance(entry, BytesStorageMetadata):
                properties = self._field(entry, "properties")
                element, arrangement = self._field(properties, "dtype"), self._field(properties, "layout")
                if type(element) is not torch.dtype or type(arrangement) is not torch.layout:
                    raise self._corrupt("properties of other types")
                dtype, layout = (str(part).removeprefix("torch.") for part in (element, arrangement))
                shape = self._numbers(self._field(entry, "size"))
                payload_bytes = sum(math.prod(chunk.sizes or ()) for chunk in chunks) * element.itemsize
            yield Entry(
                fqn,
                dtype,
                layout,
                shape,
                chunk_count=len(chunks),
                payload_bytes=payload_bytes,
                record_bytes=sum(chunk.length or 0 for chunk in found),
                file_count=len({chunk.file for chunk in found}),
                missing_records=len(chunks) - len(found),
            )

    def chunks(self, number: int) -> list[Chunk]:
        fqn = self._fqns[number]
        entry = self._metadata[fqn]
        if isinstance(entry, BytesStorageMetadata):
            return [self._chunk(None, None, MetadataIndex(fqn))]
        chunks = []
        for chunk in self._items(self._field(entry, "chunks")):
            offsets, sizes = (self._numbers(self._field(chunk, name)) for name in ("offsets", "sizes"))
            chunks.append(self._chunk(offsets, sizes, MetadataIndex(fqn, offsets)))
        return chunks

    def _chunk(self, offsets: list[int] | None, sizes: list[int] | None, index: MetadataIndex) -> Chunk:
        info = self._storage.get(index)
        if info is None:
            return Chunk(offsets, sizes)
        offset, length = self._numbers([self._field(info, name) for name in ("offset", "length")])
        # Absent where no transform was applied, or written by torch before 2.6.
        transforms = [self._text(name) for name in self._items(getattr(info, "transform_descriptors", None) or ())]
        return Chunk(offsets, sizes, self._text(self._field(info, "relative_path")), offset, length, transforms)

    def _field(self, owner: Any, name: str) -> Any:
        try:
            return getattr(owner, name)
        except AttributeError:
            raise self._corrupt(f"{type(owner).__name__} without {name}") from None

    def _items(self, values: Any) -> Sequence[Any]:
        if not isinstance(values, list | tuple):
            raise self._corrupt(f"{type(values).__name__} instead of a list")
        return values

    def _numbers(self, values: Any) -> list[int]:
        numbers = list(self._items(values))
        if any(type(number) is not int or number not in _INT64 for number in numbers):
            raise self._corrupt("sizes or places that are no numbers of 64 bits")
        return numbers

    def _text(self, value: Any) -> str:
        if type(value) is not str:
            raise self._corrupt(f"{type(value).__name__} instead of a text")
        return value

    def _corrupt(self, what: str) -> CorruptMetadataError:
        return CorruptMetadataError(f"the metadata is not as DCP writes it: {what}", self._path)
