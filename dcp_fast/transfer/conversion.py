"""Conversion: boxes that torch must place, because of their dtype or device, pass through bounded memory.

For a GPU that memory is on the GPU: a box arrives there in the dtype in which it is stored.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod

import torch

from dcp_fast import _native
from dcp_fast._torch import foreach_copy_, narrow_tensor_by_index
from dcp_fast.errors import CudaOutOfMemoryError
from dcp_fast.observe.trace import span
from dcp_fast.transfer.destinations import HOST, is_plain
from dcp_fast.transfer.devices import served_device
from dcp_fast.transfer.gpu import CudaLoad

__all__ = ["ConvertedBox", "place_converted"]

_ALIGNMENT = 64  # bytes: as torch aligns its own allocations
# What one thread reads before it converts. Each batch costs some 30 us of Python, which threads pay one at a time; past
# this size the bytes leave the last-level cache before they are converted. Measured: 1 MiB 0.36 s of CPU for 1.9 GB,
# 2 MiB 0.32, 4 MiB 0.29, 8 MiB 0.32.
_BATCH_BYTES = 4 << 20
# Elements of one copy_ on the CPU: below at::internal::GRAIN_SIZE torch stays on the calling thread. Above it, it wakes
# a team of threads for every copy, which fight the reader threads for the cores and lose more than they win.
_SERIAL_ELEMENTS = 32768 - 64


@dataclass
class ConvertedBox:
    """A box on its way from a record to a tensor of another dtype or device."""

    record: int
    dtype_code: int  # of the stored elements
    dtype: torch.dtype
    storage_offsets: Sequence[int]
    lengths: Sequence[int]
    strides: Sequence[int]  # of the stored tensor
    target: torch.Tensor  # of sizes `lengths`


# A part of a box: its offsets and lengths within the box.
_Part = tuple[ConvertedBox, tuple[int, ...], tuple[int, ...]]


@dataclass
class _Batch:
    """Parts that fill one thread's staging memory, and the rows of their transfer program."""

    items: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # target, staged
    used: int = 0


def place_converted(
    boxes: Sequence[ConvertedBox],
    layouts: _native.Layouts,
    options: _native.Options,
    memory_bytes: int,
    cuda: CudaLoad,
) -> list[_native.Stats]:
    """Read every box into staging memory and ``copy_`` it to its target.

    Args:
        boxes: what to place; no two targets may share memory.
        layouts: of the records that the boxes name.
        options: for the native reads; their own staging memory comes on top of ``memory_bytes``.
        memory_bytes: host memory for all threads together.
        cuda: brings boxes to GPUs.

    Returns:
        What was read, batch by batch.
    """
    by_device: dict[int | None, list[ConvertedBox]] = {}
    for box in boxes:
        _check_internal_overlap(box.target)
        by_device.setdefault(served_device(box.target), []).append(box)
    stats: list[_native.Stats] = []
    for device, of_device in by_device.items():
        if device is None:
            stats += _place_through_host(of_device, layouts, options, memory_bytes)
        else:
            stats.append(_place_through_device(device, of_device, layouts, options, cuda))
    return stats


def _place_through_device(
    device: int, boxes: list[ConvertedBox], layouts: _native.Layouts, options: _native.Options, cuda: CudaLoad
) -> _native.Stats:
    """Boxes arrive in one half of the memory while those in the other one are converted."""
    needed = sum(_aligned(prod(box.lengths) * box.dtype.itemsize) for box in boxes)
    # The other half of the limit is for slots of the ring.
    capacity = min(cuda.limits.device_staging_bytes // 4 // _ALIGNMENT * _ALIGNMENT, needed + _ALIGNMENT)
    memory = _allocate(2 * capacity, torch.device("cuda", device))
    halves = memory[:capacity], memory[capacity:]
    cuda.conversion_bytes = max(cuda.conversion_bytes, 2 * capacity)
    batches = [_batch(parts, halves[i % 2], device) for i, parts in enumerate(_batches(boxes, capacity))]
    programs = [_native.Program(layouts, array("q", batch.items), array("q", batch.slots)) for batch in batches]

    def convert(i: int) -> None:
        # Whoever gets the memory after this waits for it, as torch's streams order it.
        for target, staged in batches[i].copies:
            target.copy_(staged)

    return cuda.run_in_turns(programs, options, device, convert)


def _allocate(capacity: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(capacity, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise CudaOutOfMemoryError(
            f"{capacity} bytes of staging memory on {device} could not be had: {error}"
        ) from error
    except RuntimeError as error:  # what torch's allocator raises on the CPU
        raise MemoryError(f"{capacity} bytes of staging memory could not be had") from error


def _place_through_host(
    boxes: list[ConvertedBox], layouts: _native.Layouts, options: _native.Options, memory_bytes: int
) -> list[_native.Stats]:
    """Each thread reads a batch and converts it while it is still in the cache."""
    # Streams are a matter of the calling thread: copies to a device stay on it.
    on_host = all(box.target.device.type == "cpu" for box in boxes)
    threads = layouts.threads(options) if on_host else 1
    capacity = max(min(_BATCH_BYTES, memory_bytes // threads), 16 * _ALIGNMENT)
    batches = _batches(boxes, capacity)
    one_thread = options.with_threads(1)
    inference = torch.is_inference_mode_enabled()
    lock = threading.Lock()
    stop = threading.Event()
    stats: list[_native.Stats] = []

    def work() -> None:
        # The caller may have made another device the default one.
        memory = _allocate(capacity, torch.device("cpu"))
        try:
            with torch.inference_mode(inference):
                while not stop.is_set():
                    with lock:
                        parts = next(batches, None)
                    if parts is None:
                        return
                    stats.append(_place(parts, memory, layouts, one_thread))
        except BaseException:
            stop.set()
            raise

    if threads == 1:
        work()
        return stats
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="dcp_fast") as executor:
        workers = []
        try:
            for _ in range(threads):
                try:
                    workers.append(executor.submit(work))
                except RuntimeError:  # the system is out of threads: fewer do the same work
                    break
            if not workers:
                work()
            for worker in workers:
                worker.result()
        finally:
            stop.set()  # after Ctrl-C in this thread the others end with the block that they are at
    return stats


def _place(
    parts: list[_Part], memory: torch.Tensor, layouts: _native.Layouts, options: _native.Options
) -> _native.Stats:
    batch = _batch(parts, memory, HOST)
    program = _native.Program(layouts, array("q", batch.items), array("q", batch.slots))
    stats = program.run(0, options)
    # Staged copies of known dtype are all direct: what was left out would be placed from memory that nobody filled.
    assert not program.converted(0)
    assert not program.fallback(0)
    with span(options.recorder, "convert", stats.bytes_placed):
        _convert(batch)
    return stats


def _convert(batch: _Batch) -> None:
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for target, staged in batch.copies:
        if not is_plain(target) or not target.is_cpu:
            target.copy_(staged)
            continue
        if target.numel() <= _SERIAL_ELEMENTS:
            targets.append(target)
            sources.append(staged)
            continue
        if target.is_contiguous() and staged.is_contiguous():
            target, staged = target.view(-1), staged.view(-1)
        step = max(1, _SERIAL_ELEMENTS * target.size(0) // target.numel())
        targets += torch.split(target, step)
        sources += torch.split(staged, step)
    # copy_ for each pair, in one call: else the threads spend their time passing the interpreter lock around.
    if targets:
        foreach_copy_(targets, sources)


def _batch(parts: list[_Part], memory: torch.Tensor, device: int) -> _Batch:
    batch = _Batch()
    for box, offsets, lengths in parts:
        _append(batch, box, offsets, lengths, memory, device)
    return batch


def _batches(boxes: Sequence[ConvertedBox], capacity: int) -> Iterator[list[_Part]]:
    parts: list[_Part] = []
    used = 0
    for box in boxes:
        for offsets, lengths in _split(tuple(box.lengths), (capacity - _ALIGNMENT) // box.dtype.itemsize):
            size = _aligned(prod(lengths) * box.dtype.itemsize)
            if size == 0:
                continue
            if used + size > capacity and parts:
                yield parts
                parts, used = [], 0
            parts.append((box, offsets, lengths))
            used += size
    if parts:
        yield parts


def _check_internal_overlap(target: torch.Tensor) -> None:
    """Raise where copy_ would: in pieces it might not notice."""
    if target.layout is torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(target.size(), target.stride(), strict=True)
    ):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _append(
    batch: _Batch,
    box: ConvertedBox,
    offsets: tuple[int, ...],
    lengths: tuple[int, ...],
    memory: torch.Tensor,
    device: int,
) -> None:
    size = prod(lengths) * box.dtype.itemsize
    # In the order of the stored strides: torch's copy then takes the same path as from the stored tensor itself, to the
    # last bit of a NaN, and the bytes are read as they lie.
    order = sorted(range(len(lengths)), key=lambda dim: -box.strides[dim])
    staged = memory[batch.used : batch.used + size].view(box.dtype).view([lengths[dim] for dim in order])
    staged = staged.permute([order.index(dim) for dim in range(len(lengths))])
    batch.used += _aligned(size)
    dims = len(lengths)
    source = [start + offset for start, offset in zip(box.storage_offsets, offsets, strict=True)]
    batch.items += (box.record, len(batch.copies), dims, *source, *(0,) * dims, *lengths)
    batch.slots += (staged.data_ptr(), device, box.dtype_code, dims, *lengths, *staged.stride())
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
