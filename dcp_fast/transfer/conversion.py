"""Conversion by torch: boxes that it must place, for their dtypes or device, pass through memory of limited size.

The engine itself converts what goes to host memory, but for rare pairs of dtypes (csrc/copy/convert.h).

The engine reads a batch of boxes (batches.py) into that memory, in the dtype in which they are stored. torch's
``copy_`` brings each of them from there to its target.

- For targets in host memory, and on devices that the engine cannot write to, the memory is a bounce buffer of each
  reader thread. The thread reads a batch and converts it at once, while it is still in the cache.
- For targets on a CUDA device, the memory is staging memory on that device. It has two halves: one batch arrives in one
  of them while torch converts the batch before, which lies in the other.

Where ranks share reads, each batch arrives in an exchange of its own (shared_batches.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.observe.trace import span
from dcp_fast.transfer.batches import ALIGNMENT, Batch, ConvertedBox, Part, batches_of, bytes_of
from dcp_fast.transfer.bounce import check_internal_overlap, copy_on_host, is_on_host, place_in_threads
from dcp_fast.transfer.destinations import HOST
from dcp_fast.transfer.devices import served_device
from dcp_fast.transfer.gpu import CudaLoad


def place_converted(
    boxes: Sequence[ConvertedBox],
    layouts: _native.Layouts,
    options: _native.Options,
    buffer_bytes: int,
    cuda: CudaLoad,
) -> list[_native.Stats]:
    """Read every box, convert it and bring it to its target.

    Args:
        boxes: what to place; no two targets may share memory.
        layouts: of the records that the boxes name.
        options: for the native reads; their own bounce buffers come on top of ``buffer_bytes``.
        buffer_bytes: host memory for the bounce buffers of all threads together.
        cuda: brings boxes to GPUs.

    Returns:
        What was read, batch by batch.

    Raises:
        RuntimeError: several elements of a target share memory, as ``copy_`` raises.
        MemoryError: there is no memory for a buffer.
        CudaOutOfMemoryError: the same on a device.
        CudaRefusedError, NativeError: as ``CudaLoad.run``.
    """
    stats: list[_native.Stats] = []
    for device, of_device in by_device(boxes).items():
        if device is None:
            stats += _place_through_host(of_device, layouts, options, buffer_bytes)
        else:
            stats.append(_place_through_device(device, of_device, layouts, options, cuda))
    return stats


def by_device(boxes: Sequence[ConvertedBox]) -> dict[int | None, list[ConvertedBox]]:
    """Boxes by the CUDA device that they pass through on their way; None: the host.

    Raises:
        RuntimeError: several elements of a target share memory, as ``copy_`` raises.
    """
    found: dict[int | None, list[ConvertedBox]] = {}
    for box in boxes:
        check_internal_overlap(box.target)
        found.setdefault(served_device(box.target), []).append(box)
    return found


def empty(batch: Batch[ConvertedBox], device: int | None, options: _native.Options) -> None:
    """Convert what a buffer has, and bring it to its targets.

    Args:
        batch: in a buffer that is filled.
        device: that the buffer lies on; None: the host.
        options: whose recorder notes the time on the host.
    """
    copies = [
        (narrow_tensor_by_index(part.box.target, part.offsets, part.lengths), source)
        for part, source in zip(batch.parts, batch.sources, strict=True)
    ]
    if device is None:
        with span(options.recorder, "convert", sum(source.nbytes for source in batch.sources)):
            copy_on_host(copies)
        return
    # torch's allocator may give the memory away after this. Its streams see to it that this copy is done before.
    for target, source in copies:
        target.copy_(source)


def _place_through_host(
    boxes: list[ConvertedBox], layouts: _native.Layouts, options: _native.Options, buffer_bytes: int
) -> list[_native.Stats]:
    def place(parts: list[Part[ConvertedBox]], buffer: torch.Tensor, options: _native.Options) -> _native.Stats:
        batch = Batch(parts, buffer, HOST)
        stats = batch.program(layouts).run(0, options)
        empty(batch, None, options)
        return stats

    threads = layouts.threads(options) if all(is_on_host(box.target) for box in boxes) else 1
    return place_in_threads(partial(batches_of, boxes), place, threads, options, buffer_bytes)


# Through staging memory on a device


def _place_through_device(
    device: int, boxes: list[ConvertedBox], layouts: _native.Layouts, options: _native.Options, cuda: CudaLoad
) -> _native.Stats:
    halves = cuda.halves(device, sum(map(bytes_of, boxes)) + ALIGNMENT)
    parts_of_batches = batches_of(boxes, halves[0].numel())
    batches = [Batch(parts, halves[i % 2], device) for i, parts in enumerate(parts_of_batches)]

    def convert(i: int) -> None:
        empty(batches[i], device, options)

    return cuda.run_in_turns([batch.program(layouts) for batch in batches], options, device, convert)
