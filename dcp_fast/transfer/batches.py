"""Batches: boxes that torch converts, cut and gathered so that each batch fits into a buffer of a few megabytes.

A box may be larger than the buffer, so it is cut into parts. Most parts are smaller, so as many as fit into the buffer
make up a batch. The engine fills the buffer with a batch. torch's ``copy_`` takes each part from there to its target.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, TypeVar

import torch

from dcp_fast import _native

ALIGNMENT = 64  # bytes: as torch aligns its own allocations


@dataclass
class StoredBox:
    """A box of a stored tensor.

    Attributes:
        record: its index in the layouts.
        dtype_code, dtype: of the stored elements, as the engine and as torch name it.
        storage_offsets: where the box begins in the stored tensor, in elements of each dimension.
        lengths: of the box, in elements.
        strides: of the stored tensor, in elements.
    """

    record: int
    dtype_code: int
    dtype: torch.dtype
    storage_offsets: Sequence[int]
    lengths: Sequence[int]
    strides: Sequence[int]


@dataclass
class ConvertedBox(StoredBox):
    """A box on its way from a record to a tensor of another dtype or device.

    ``target`` is the tensor to write, of sizes ``lengths``.
    """

    target: torch.Tensor


Box = TypeVar("Box", bound=StoredBox)


@dataclass(slots=True)
class Part(Generic[Box]):
    """A part of a box.

    Attributes:
        offsets: from where the box begins, in elements of each dimension.
        lengths: in elements.
        size: what it takes of a buffer, in bytes.
    """

    box: Box
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    size: int


def bytes_of(box: StoredBox) -> int:
    """What a box takes of a buffer if it is not cut."""
    return _aligned(prod(box.lengths) * box.dtype.itemsize)


def batches_of(boxes: Sequence[Box], capacity: int) -> Iterator[list[Part[Box]]]:
    """Cut boxes into parts, and gather these into batches of at most ``capacity`` bytes, in order."""
    batch: list[Part[Box]] = []
    used = 0
    for box in boxes:
        for offsets, lengths in _cut(tuple(box.lengths), (capacity - ALIGNMENT) // box.dtype.itemsize):
            size = _aligned(prod(lengths) * box.dtype.itemsize)
            if size == 0:
                continue
            if used + size > capacity and batch:
                yield batch
                batch, used = [], 0
            batch.append(Part(box, offsets, lengths, size))
            used += size
    if batch:
        yield batch


class Batch(Generic[Box]):
    """A batch in a buffer, and the transfer program that fills it.

    Args:
        parts: what it consists of.
        buffer: bytes that have room for it.
        device: where the buffer lies, as in destinations.py.

    Attributes:
        sources: of each part a view of the buffer in the stored dtype.
    """

    def __init__(self, parts: Sequence[Part[Box]], buffer: torch.Tensor, device: int) -> None:
        self.parts = parts
        self.sources: list[torch.Tensor] = []
        self._items: list[int] = []  # rows for _native.Program, as are those of destinations
        self._destinations: list[int] = []
        begin = 0
        for part in parts:
            self._add(part, buffer[begin : begin + part.size], device)
            begin += part.size

    def program(self, layouts: _native.Layouts) -> _native.Program:
        program = _native.Program(layouts, array("q", self._items), array("q", self._destinations))
        # A buffer has the stored dtype, and lies where the engine can write. What was left out would be copied from
        # memory that nobody filled.
        assert not program.converted(0)
        assert not program.fallback(0)
        return program

    def _add(self, part: Part[Box], memory: torch.Tensor, device: int) -> None:
        box, lengths = part.box, part.lengths
        dims = len(lengths)
        # The source has its dimensions in the order of the stored strides. The bytes are then read as they lie, and
        # torch's copy takes the same path as from the stored tensor itself, to the last bit of a NaN.
        order = sorted(range(dims), key=lambda dim: -box.strides[dim])
        source = memory[: prod(lengths) * box.dtype.itemsize].view(box.dtype).view([lengths[dim] for dim in order])
        source = source.permute([order.index(dim) for dim in range(dims)])
        begin = [start + offset for start, offset in zip(box.storage_offsets, part.offsets, strict=True)]
        self._items += (box.record, len(self.sources), dims, *begin, *(0,) * dims, *lengths)
        self._destinations += (
            source.data_ptr(),
            device,
            box.dtype_code,
            box.dtype.itemsize,
            dims,
            *lengths,
            *source.stride(),
        )
        self.sources.append(source)


def _cut(lengths: tuple[int, ...], most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes of at most ``most`` elements. Yields offsets and lengths of each."""
    if prod(lengths) <= most:
        yield (0,) * len(lengths), lengths
        return
    inner = prod(lengths[1:])
    step = max(1, most // inner)
    for start in range(0, lengths[0], step):
        size = min(step, lengths[0] - start)
        if size * inner <= most:
            yield (start, *(0,) * (len(lengths) - 1)), (size, *lengths[1:])
        else:
            for offsets, rest in _cut(lengths[1:], most):
                yield (start, *offsets), (1, *rest)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
