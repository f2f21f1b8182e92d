"""Metadata that one rank reads and parses, and the others receive as columns.

1. Each rank looks at its file: its size, its first and last bytes. One collective call tells whether all ranks can
   share and see the same file. If not, each reads its own, as without sharing.
2. The coordinator parses, and broadcasts the sizes of the columns. There are none if parsing failed, or if the metadata
   is of a kind that is not kept in columns. Then too each rank reads its own, so that all get the errors, and the
   metadata of their own instead, that they would get without sharing.
3. It broadcasts the columns, in blocks. What goes wrong on a rank meanwhile is kept until the last block has come:
   whoever leaves early makes all others wait.

What could fail on one rank alone, the memory for blocks included, is done before step 1 or kept as an outcome.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader

from dcp_fast import _native
from dcp_fast._torch import DistWrapper
from dcp_fast.errors import LoadError, typed_errors
from dcp_fast.metadata.read import known_columns, make_metadata
from dcp_fast.ranks.collectives import Outcome, collective_device, largest
from dcp_fast.readers.filesystem import FileSystemReader

__all__ = ["share_metadata"]

T = TypeVar("T")

# Of the file. To read less takes no longer than the few broadcasts.
_LEAST_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20
# The end of the file holds an identifier that is new for each save, since torch 2.3. Inode and time would not tell what
# is in a file: copies on the disks of several nodes differ in the one and perhaps in the other, and clients of a
# network file system may remember both for a while.
_END_BYTES = 4096
_IDENTITY_NUMBERS = 3


def share_metadata(reader: StorageReader, ranks: DistWrapper) -> Callable[[], Metadata]:
    """Have the coordinator read the metadata for all ranks, where they can share it. All ranks must call it.

    Returns:
        What is to be called instead of the reader's ``read_metadata``. It raises what that would.

    Raises:
        RuntimeError: as the process group does, whose other ranks cannot be reached any more.
    """
    prepared = Outcome(partial(_prepare, reader, ranks))
    exchange = None if prepared.error is not None else prepared.value
    if not _agree(ranks, None if exchange is None else exchange.identity) or exchange is None:
        if prepared.error is None or isinstance(prepared.error, Exception):
            return reader.read_metadata  # which meets the error again, or can do without a block
        return partial(_raise, prepared.error)  # Ctrl-C
    return exchange.send() if ranks.is_coordinator else exchange.receive()


def _prepare(reader: StorageReader, ranks: DistWrapper) -> _Exchange | None:
    """None if there is nothing to share.

    Raises:
        OSError: the metadata file is not there or cannot be read.
        MemoryError: there is none for a block.
    """
    if not _reads_like_ours(reader):
        return None
    with reader.fs.create_stream(reader._get_metadata_path(), "rb") as file:
        head = file.read(_END_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        digest = hashlib.sha256(head + file.read()).digest()
    if size < _LEAST_BYTES:
        return None
    # 63 bits each, as the numbers of a tensor have signs.
    hashes = (int.from_bytes(digest[i : i + 8], "little") >> 1 for i in (0, 8))
    return _Exchange(reader, ranks, [size, *hashes])


def _reads_like_ours(reader: StorageReader) -> TypeGuard[FileSystemReader]:
    """Whether the reader reads metadata into columns in just the way of ours. A subclass may read another file."""
    return (
        isinstance(reader, FileSystemReader)
        and not reader.trust_metadata
        and type(reader).read_metadata is FileSystemReader.read_metadata
        and "read_metadata" not in vars(reader)
    )


def _raise(error: BaseException) -> Metadata:
    raise error


def _agree(ranks: DistWrapper, identity: list[int] | None) -> bool:
    """Whether all ranks have the same identity, and not None."""
    numbers = [0] * _IDENTITY_NUMBERS if identity is None else identity
    # Only if all ranks have the same number are the largest of it and the largest of its negative that number.
    has_none, *largests = largest(ranks, [identity is None, *numbers, *(-number for number in numbers)])
    highest, lowest = largests[:_IDENTITY_NUMBERS], [-number for number in largests[_IDENTITY_NUMBERS:]]
    return not has_none and highest == lowest


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Keep Ctrl-C from taking this rank away between two broadcasts, for which the others would wait.

    Yields:
        What is to be called afterwards: it raises what Ctrl-C would have raised. A second Ctrl-C is not deferred.
    """
    handler = signal.getsignal(signal.SIGINT)
    struck: list[tuple[int, FrameType | None]] = []

    def strike() -> None:
        if struck and callable(handler):
            handler(*struck[0])

    def defer(number: int, frame: FrameType | None) -> None:
        struck.append((number, frame))
        if len(struck) > 1:
            strike()

    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield strike
        return
    signal.signal(signal.SIGINT, defer)
    try:
        yield strike
    finally:
        signal.signal(signal.SIGINT, handler)


class _Exchange:
    """One rank's end of it."""

    def __init__(self, reader: FileSystemReader, ranks: DistWrapper, identity: list[int]) -> None:
        self.identity = identity
        self._reader = reader
        self._ranks = ranks
        self._path = str(reader._get_metadata_path())
        self._file_bytes = identity[0]
        device = collective_device(ranks)
        self._sizes = torch.zeros(1 + _native.COLUMNS_SECTIONS, dtype=torch.int64, device=device)
        self._memory = bytearray(_BLOCK_BYTES)
        self._block = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._device_block = self._block if device.type == "cpu" else torch.empty_like(self._block, device=device)

    def send(self) -> Callable[[], Metadata]:
        """Read the metadata, and send it if it is kept in columns."""
        with self._reader.metadata_stage():
            parsed = Outcome(self._parse)
            encoder = None if parsed.error is not None else parsed.value[1]
            sizes = [] if encoder is None else encoder.sizes
            with _deferred_interrupt() as interrupt:
                self._sizes[: 1 + len(sizes)] = torch.tensor([len(sizes), *sizes])
                self._broadcast(self._sizes)
                while encoder is not None and (size := encoder.read(self._memory)) > 0:
                    if self._device_block is not self._block:
                        self._device_block[:size].copy_(self._block[:size])
                    self._broadcast(self._device_block[:size])

            def finish() -> Metadata:
                interrupt()
                return self._reader.take_metadata(parsed.get()[0]())

            return Outcome(finish).get

    def _parse(self) -> tuple[Callable[[], Metadata], _native.ColumnsEncoder | None]:
        """What makes the metadata, and the columns as they are sent, if they are."""
        columns = self._reader.metadata_columns()
        if columns is None:
            # The others begin with the same at once, rather than wait.
            return self._reader.unpickled_metadata, None
        with typed_errors():
            return partial(make_metadata, columns), _native.encode_columns(columns, self._file_bytes)

    def receive(self) -> Callable[[], Metadata]:
        """Take what the coordinator sends."""
        with self._reader.metadata_stage(received=True):
            with _deferred_interrupt() as interrupt:
                self._broadcast(self._sizes)
                count, *sizes = self._sizes.tolist()
                decoder = Outcome(lambda: self._checked(_native.ColumnsDecoder, sizes, self._file_bytes))
                for begin in range(0, sum(sizes), _BLOCK_BYTES):
                    size = min(sum(sizes) - begin, _BLOCK_BYTES)
                    self._broadcast(self._device_block[:size])
                    if decoder.error is None:
                        decoder = Outcome(partial(self._take_block, decoder.value, size))
            interrupted = Outcome(interrupt)
            if interrupted.error is not None:
                return partial(_raise, interrupted.error)
            if count == 0:
                return self._reader.read_metadata
            received = Outcome(lambda: self._finish(decoder.get()))
            if received.error is None and received.value is None:
                return self._reader.read_metadata
            return cast(Callable[[], Metadata], received.get)

    def _take_block(self, decoder: _native.ColumnsDecoder, size: int) -> _native.ColumnsDecoder:
        if self._device_block is not self._block:
            self._block[:size].copy_(self._device_block[:size])
        self._checked(decoder.write, self._memory, size)
        return decoder

    def _finish(self, decoder: _native.ColumnsDecoder) -> Metadata | None:
        """None if this rank's torch lacks a dtype that the coordinator's has."""
        columns = known_columns(self._checked(decoder.finish))
        return None if columns is None else self._reader.take_metadata(make_metadata(columns))

    def _checked(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a native function. Its errors are those of what came from the coordinator."""
        try:
            with typed_errors():
                return function(*arguments)
        except LoadError as error:
            reason = f"metadata that rank {self._ranks.coordinator_rank} sent: {error.reason}"
            raise type(error)(reason, self._path, error_number=error.error_number) from None

    def _broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, self._ranks.global_coordinator_rank, group=self._ranks.group)
