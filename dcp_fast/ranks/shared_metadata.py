"""Metadata whose file one rank reads, and the others receive as bytes.

1. Each rank looks at its file: its size, its first and last bytes. One collective call tells whether all ranks can
   share and see the same file. If not, each reads its own, as without sharing.
2. The coordinator reads the file and broadcasts it, in blocks. Each rank parses the blocks as they come, as it would
   parse the file. A byte after each block tells whether the block is to be used. If the coordinator cannot read or
   parse, that byte says no, and no more blocks come. Any other rank that fails takes part until the last block has come
   and raises its error then, because a rank that leaves early makes all others wait.
3. A rank that could make nothing of the blocks reads its own file. So it gets the error, or the metadata, that it would
   get without sharing.

What could fail on one rank alone, the memory for blocks included, is done before step 1 or kept as an outcome.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeGuard, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import StorageReader

from dcp_fast._torch import DistWrapper
from dcp_fast.errors import CorruptMetadataError
from dcp_fast.metadata.read import make_metadata, parse_blocks
from dcp_fast.ranks.collectives import Outcome, collective_device, largest
from dcp_fast.ranks.interrupts import deferred_interrupt
from dcp_fast.readers.engine_reader import owned_by
from dcp_fast.readers.filesystem import FileSystemReader, file_content
from dcp_fast.this_load import option

# Of the file. To read less takes no longer than the few broadcasts.
_LEAST_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20
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
    broadcast = None if prepared.error is not None else prepared.value
    if not _have_same(ranks, None if broadcast is None else broadcast.identity) or broadcast is None:
        if prepared.error is None or isinstance(prepared.error, Exception):
            return reader.read_metadata  # which meets the error again, or can do without a block
        return partial(_raise, prepared.error)  # Ctrl-C
    return broadcast.take_part()


def _prepare(reader: StorageReader, ranks: DistWrapper) -> _Broadcast | None:
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
    return _Broadcast(reader, ranks, [size, *hashes])


def _reads_like_ours(reader: StorageReader) -> TypeGuard[FileSystemReader]:
    """Whether the reader reads metadata in just the way of ours. A subclass may read another file."""
    return (
        isinstance(reader, FileSystemReader)
        and not option(reader, "trust_metadata")
        and type(reader).read_metadata is FileSystemReader.read_metadata
        and "read_metadata" not in vars(reader)
    )


def _raise(error: BaseException) -> Metadata:
    raise error


def _have_same(ranks: DistWrapper, identity: list[int] | None) -> bool:
    """Whether all ranks have the same identity, and not None."""
    numbers = [0] * _IDENTITY_NUMBERS if identity is None else identity
    # Only if all ranks have the same number are the largest of it and the largest of its negative that number.
    has_none, *largests = largest(ranks, [identity is None, *numbers, *(-number for number in numbers)])
    highest, lowest = largests[:_IDENTITY_NUMBERS], [-number for number in largests[_IDENTITY_NUMBERS:]]
    return not has_none and highest == lowest


class _Broadcast:
    """One rank's end of the broadcast of the file.

    Args:
        identity: what tells the file from others: its size in bytes, and two hashes.
    """

    def __init__(self, reader: FileSystemReader, ranks: DistWrapper, identity: list[int]) -> None:
        self.identity = identity
        self._reader = reader
        self._ranks = ranks
        self._path = reader._get_metadata_path()
        self._left = self._file_bytes = identity[0]
        self._stored = self._stored_blocks() if ranks.is_coordinator else None
        self._memory = bytearray(_BLOCK_BYTES + 1)
        self._block = torch.frombuffer(self._memory, dtype=torch.uint8)
        device = collective_device(ranks)
        self._device_block = self._block if device.type == "cpu" else torch.empty_like(self._block, device=device)

    def take_part(self) -> Callable[[], Metadata]:
        """Send or receive the blocks, and parse them. Returns what yields the metadata, or raises what is wrong."""
        with self._reader.metadata_stage(received=self._stored is None):
            parsed = Outcome(self._parse)
        if parsed.error is None and parsed.value is None:
            return self._reader.read_metadata
        return cast(Callable[[], Metadata], parsed.get)

    def _parse(self) -> Metadata | None:
        """None if only the file itself tells what the metadata is."""
        with deferred_interrupt():
            parsed = Outcome(partial(parse_blocks, self._file_bytes, self._next_block, str(self._path)))
            while self._left:  # others may need the rest, or wait for a word that there is none
                self._next_block(is_over=True)
        try:
            columns = parsed.get()
        except CorruptMetadataError:  # perhaps not in this rank's own file
            return None
        if columns is None:
            return None
        read_again = partial(file_content, self._reader, self._path)
        return owned_by(self._reader, make_metadata(columns, read_again, str(self._path)))

    def _next_block(self, is_over: bool = False) -> memoryview:
        """The next bytes of the file, on all ranks; none if no more come, which the coordinator says if ``is_over``."""
        count = min(self._left, _BLOCK_BYTES)
        left, self._left = self._left - count, 0  # there is nothing to wait for if the broadcast fails
        if count > 0:
            if self._stored is not None:
                self._memory[count] = is_over or Outcome(partial(next, self._stored)).value != count
            self._broadcast(count + 1)
            if self._memory[count]:
                count = 0
            else:
                self._left = left
        return memoryview(self._memory)[:count]

    def _stored_blocks(self) -> Iterator[int]:
        """Read one block of the file after another. Yields how many bytes each has."""
        with self._reader.fs.create_stream(self._path, "rb") as file:
            while True:
                yield cast(io.BufferedIOBase, file).readinto(memoryview(self._memory)[:_BLOCK_BYTES])

    def _broadcast(self, count: int) -> None:
        on_device = self._device_block is not self._block
        if on_device and self._stored is not None:
            self._device_block[:count].copy_(self._block[:count])
        dist.broadcast(self._device_block[:count], self._ranks.global_coordinator_rank, group=self._ranks.group)
        if on_device and self._stored is None:
            self._block[:count].copy_(self._device_block[:count])
