"""Staged placement: boxes that torch must place itself, because of their dtype or device, pass through bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index

from dcp_fast import _native

__all__ = ["StagedBox", "place_staged"]

_ALIGNMENT = 64  # bytes: as torch aligns its own allocations


@dataclass
class StagedBox:
    """A box on its way from a record to a tensor of another dtype or device."""

    record: int
    dtype_code: int  # of the stored elements
    dtype: torch.dtype
    storage_offsets: Sequence[int]
    lengths: Sequence[int]
    target: torch.Tensor  # of sizes `lengths`


@dataclass
class _Batch:
    """Boxes that fill one half of the staging memory."""

    items: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # target, staged
    used: int = 0


def place_staged(
    boxes: Sequence[StagedBox], layouts: _native.Layouts, options: _native.Options, staging_bytes: int
) -> list[_native.Stats]:
    """Read every box into staging and ``copy_`` it to its target.

    One half of the staging memory is read into by the native threads while torch empties the other.

    Args:
        boxes: what to place; no two targets may share memory.
        layouts: of the records that the boxes name.
        options: for the native reads; their own staging memory comes on top of ``staging_bytes``.
        staging_bytes: for both halves together.

    Returns:
        What was read, batch by batch.
    """
    half = max(staging_bytes // 2, _ALIGNMENT)
    memory = torch.empty(2 * half, dtype=torch.uint8)
    stats: list[_native.Stats] = []
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="dcp_fast") as executor:
        pending: tuple[_Batch, Future[_native.Stats]] | None = None
        for batch in _batches(boxes, (memory[:half], memory[half:])):
            reading = executor.submit(_read, batch, layouts, options)
            if pending is not None:
                _finish(*pending, stats)  # empties the half that the next batch will fill
            pending = (batch, reading)
        if pending is not None:
            _finish(*pending, stats)
    return stats


def _read(batch: _Batch, layouts: _native.Layouts, options: _native.Options) -> _native.Stats:
    return _native.Program(layouts, array("q", batch.items), array("q", batch.slots)).run(0, options)


def _finish(batch: _Batch, reading: Future[_native.Stats], stats: list[_native.Stats]) -> None:
    stats.append(reading.result())
    for target, staged in batch.copies:
        target.copy_(staged)


def _batches(boxes: Sequence[StagedBox], halves: tuple[torch.Tensor, torch.Tensor]) -> Iterator[_Batch]:
    number = 0
    capacity = halves[0].numel()
    batch = _Batch()
    for box in boxes:
        for offsets, lengths in _split(tuple(box.lengths), max(capacity // box.dtype.itemsize, 1)):
            size = prod(lengths) * box.dtype.itemsize
            if size == 0:
                continue
            if batch.used + size > capacity:
                yield batch
                number += 1
                batch = _Batch()
            _append(batch, box, offsets, lengths, halves[number % 2])
    if batch.items:
        yield batch


def _append(
    batch: _Batch, box: StagedBox, offsets: tuple[int, ...], lengths: tuple[int, ...], memory: torch.Tensor
) -> None:
    size = prod(lengths) * box.dtype.itemsize
    staged = memory[batch.used : batch.used + size].view(box.dtype).view(lengths)
    batch.used += -(-size // _ALIGNMENT) * _ALIGNMENT
    dims = len(lengths)
    source = [start + offset for start, offset in zip(box.storage_offsets, offsets, strict=True)]
    batch.items += (box.record, len(batch.copies), dims, *source, *(0,) * dims, *lengths)
    batch.slots += (staged.data_ptr(), True, box.dtype_code, dims, *lengths, *staged.stride())
    batch.copies.append((narrow_tensor_by_index(box.target, offsets, lengths), staged))


def _split(lengths: tuple[int, ...], limit: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes of at most ``limit`` elements: (offsets, lengths) of each."""
    if prod(lengths) <= limit:
        yield (0,) * len(lengths), lengths
        return
    inner = prod(lengths[1:])
    step = max(1, limit // inner)
    for start in range(0, lengths[0], step):
        size = min(step, lengths[0] - start)
        if size * inner <= limit:
            yield (start, *(0,) * (len(lengths) - 1)), (size, *lengths[1:])
        else:
            for offsets, rest in _split(lengths[1:], limit):
                yield (start, *offsets), (1, *rest)
