"""Reads metadata: natively into columns, else by an unpickler with an allow-list."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.errors import (
    CorruptMetadataError,
    LoadError,
    MetadataAccessError,
    OutOfMemoryError,
    TruncatedFileError,
    UntrustedMetadataError,
    typed_errors,
)
from dcp_fast.metadata.allowed import has_field
from dcp_fast.metadata.attributes import with_attributes
from dcp_fast.metadata.entries import Entries, StorageEntries, Unpickled
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.metadata.unpickler import MetadataUnpickler, MissingError
from dcp_fast.names import cut
from dcp_fast.unpickling import RefusedError

_REFUSED = (
    "which is not on the list of what is made of metadata, and may run code. If you trust the file, "
    "trust_metadata=True of load, FileSystemReader or install unpickles it as torch does"
)


def read_metadata(path: str) -> Metadata:
    """Metadata as torch would unpickle it, but nothing that the file names is run.

    Args:
        path: of a regular file, which is read in small pieces.

    Raises:
        FileAccessError: the file cannot be read.
        CorruptMetadataError: the file is damaged.
        UntrustedMetadataError: it names a global, or asks for something, that is not on the allow-list.
    """
    metadata = read_natively(path)
    return _unpickled(_content(path), path) if metadata is None else metadata


def read_natively(path: str, trusted: bool = False) -> Metadata | None:
    """The same, or None for metadata that the native reader does not know.

    Args:
        trusted: as of :func:`make_metadata`.
    """
    with _errors_of(path):
        columns = _known_columns(_native.read_metadata(path))
    return None if columns is None else make_metadata(columns, partial(_content, path), path, trusted)


def parse_metadata(pickled: bytes, path: str, read_again: Callable[[], bytes]) -> Metadata:
    """The same for the content of a file. Raises as :func:`read_metadata`, but for FileAccessError.

    Args:
        read_again: as of :func:`make_metadata`.
    """
    metadata = parse_natively(pickled, path, read_again)
    return _unpickled(pickled, path) if metadata is None else metadata


def parse_natively(
    pickled: bytes, path: str, read_again: Callable[[], bytes], trusted: bool = False
) -> Metadata | None:
    """The same, or None for metadata that the native reader does not know."""
    with _errors_of(path):
        columns = _known_columns(_native.parse_metadata(pickled))
    return None if columns is None else make_metadata(columns, read_again, path, trusted)


def parse_blocks(size: int, next_block: Callable[[], Buffer], path: str) -> _native.MetadataColumns | None:
    """The columns of metadata that arrives in blocks; None if only the file tells, or if the blocks end early.

    Args:
        size: of all blocks together.
        next_block: returns the next one, which is kept until it is called again, or an empty one if no more come.
        path: named in errors.

    Raises:
        CorruptMetadataError: the bytes are damaged.
    """
    with _errors_of(path):
        return _known_columns(_native.parse_blocks(size, next_block))


def _content(path: str) -> bytes:
    with _errors_of(path), open(path, "rb") as file:
        return file.read()


@contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        with typed_errors():
            yield
    except LoadError as error:
        cls = CorruptMetadataError if isinstance(error, TruncatedFileError) else type(error)
        raise cls(error.reason, path, "", error.offset, error.length, error.error_number) from None


def _known_columns(columns: _native.MetadataColumns | str) -> _native.MetadataColumns | None:
    """None for what has to be unpickled in Python.

    This unpickler has words for dtypes that this torch lacks, and it keeps fields that this torch has and the columns
    have no place for.
    """
    if isinstance(columns, str) or any(_dtype(code) is None for code in columns.dtypes):
        return None
    return None if any(has_field(*field) for field in columns.left_out) else columns


def make_metadata(
    columns: _native.MetadataColumns, read_again: Callable[[], bytes], path: str, trusted: bool = False
) -> Metadata:
    """Metadata whose dicts make their values from columns.

    Args:
        read_again: returns the content of the file. Called when somebody asks for an attribute that the columns do not
            hold, such as the plans that Megatron-Core keeps.
        path: of the file, for errors.
        trusted: whether such an attribute is unpickled as torch does, which runs whatever code the file names.
    """
    storage_meta = None
    if columns.storage_meta:
        # Only plain values and paths: see csrc/metadata/plain_pickle.h.
        checkpoint_id, save_id, load_id, modules = pickle.loads(columns.storage_meta)
        storage_meta = StorageMeta(checkpoint_id, save_id, load_id, [] if modules is None else modules)
    metadata = Metadata(
        state_dict_metadata=LazyDict.of(Entries(columns)),
        planner_data=_unpickled_later(columns.planner_data),
        storage_data=LazyDict.of(StorageEntries(columns)) if columns.has_storage else None,
        storage_meta=storage_meta,
        version=columns.version,
    )
    attributes = dict(columns.attributes)  # as of dicts, the last one of a name counts
    unmade = {name for name, pickled in attributes.items() if pickled is None}
    # Plain dicts and values: C code such as the encoder of json looks into them.
    vars(metadata).update((name, pickle.loads(pickled)) for name, pickled in attributes.items() if pickled)
    if not unmade:
        return metadata
    save_id = None if storage_meta is None else storage_meta.save_id

    def make() -> dict[str, Any]:
        try:
            pickled = read_again()
        except OSError as error:
            reason = f"the file of the metadata cannot be read again for {cut(', '.join(sorted(unmade)))}: {error}"
            raise MetadataAccessError(reason, path, error_number=error.errno or 0) from error
        unpickled = _unpickled_as_torch(pickled, path) if trusted else _unpickled(pickled, path)
        if not _is_same(unpickled, columns, save_id) or not unmade <= vars(unpickled).keys():
            reason = f"the metadata has changed since it was read, so it cannot give {cut(', '.join(sorted(unmade)))}"
            raise MetadataAccessError(reason, path, error_number=errno.ESTALE)
        return vars(unpickled)

    return with_attributes(metadata, unmade, make)


def _is_same(unpickled: Metadata, columns: _native.MetadataColumns, save_id: str | None) -> bool:
    """Whether unpickled metadata is of the save that the columns are of."""
    meta = getattr(unpickled, "storage_meta", None)
    rows = len(unpickled.storage_data) if isinstance(unpickled.storage_data, dict) else 0
    return (
        (None if meta is None else meta.save_id) == save_id
        and rows == columns.row_count
        and list(unpickled.state_dict_metadata) == columns.fqns()
    )


def _dtype(code: int) -> torch.dtype | None:
    return getattr(torch, _native.METADATA_DTYPES[code], None)


def _unpickled_later(pickled: bytes) -> Any:
    # The protocol takes two bytes; then begins a dict or something small.
    return LazyDict.of(Unpickled(pickled)) if pickled[2:3] == pickle.EMPTY_DICT else pickle.loads(pickled)


def _unpickled_as_torch(pickled: bytes, path: str) -> Metadata:
    try:
        metadata: Metadata = pickle.loads(pickled)
        return metadata
    except Exception as error:  # an AttributeError of it would say that there is no such attribute
        reason = f"the metadata cannot be unpickled: {type(error).__name__}: {cut(str(error))}"
        raise CorruptMetadataError(reason, path, "", 0, len(pickled)) from error


def _unpickled(pickled: bytes, path: str) -> Metadata:
    """Metadata of which there are no columns, by an unpickler with an allow-list."""
    unpickler = MetadataUnpickler(pickled)
    try:
        with paused_collection():
            metadata = unpickler.load()
            if type(metadata) is not Metadata or not isinstance(metadata.state_dict_metadata, dict):
                raise CorruptMetadataError("the file holds something else than Metadata", path, "", 0, len(pickled))
    except LoadError:
        raise
    except RefusedError as error:
        why = error.why if isinstance(error, MissingError) else _REFUSED
        raise UntrustedMetadataError(
            f"the metadata asks for {error}, {why}", path, "", unpickler.position(), 0
        ) from None
    except MemoryError as error:
        raise OutOfMemoryError("out of memory to unpickle the metadata", path) from error
    except Exception as error:
        reason = f"the metadata cannot be unpickled: {type(error).__name__}: {cut(str(error))}"
        raise CorruptMetadataError(reason, path, "", min(unpickler.position(), len(pickled)), 0) from error
    return metadata
