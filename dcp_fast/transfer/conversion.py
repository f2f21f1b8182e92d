"""Conversion by torch: boxes that it must place, for their dtypes or device, pass through memory of limited size.

The engine itself converts what goes to host memory, but for rare pairs of dtypes (csrc/copy/convert.h).

The engine reads a batch of boxes (batches.py) into that memory, in the dtype in which they are stored. torch's
``copy_`` brings each of them from there to its target.

- For targets in host memory, and on devices that the engine cannot write to, the memory is a bounce buffer of each
  reader thread. The thread reads a batch and converts it at once, while it is still in the cache.
- For targets on a CUDA device, the memory is staging memory on that device. It has two halves: one batch arrives in one
  of them while torch converts the batch before, which lies in the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from dcp_fast import _native
from dcp_fast._torch import foreach_copy_
from dcp_fast.errors import CudaOutOfMemoryError
from dcp_fast.observe.trace import span
from dcp_fast.transfer.batches import ALIGNMENT, Batch, ConvertedBox, Part, batches_of, bytes_of
from dcp_fast.transfer.destinations import HOST, is_plain
from dcp_fast.transfer.devices import served_device
from dcp_fast.transfer.gpu import CudaLoad

__all__ = ["place_converted"]

# What one thread reads before it converts. Each batch costs some 30 us of Python, which threads pay one at a time; past
# this size the bytes leave the last-level cache before they are converted. Measured: 1 MiB 0.36 s of CPU for 1.9 GB,
# 2 MiB 0.32, 4 MiB 0.29, 8 MiB 0.32.
_BATCH_BYTES = 4 << 20
_LEAST_BATCH_BYTES = 16 * ALIGNMENT
# Elements of one copy_ on the CPU: below at::internal::GRAIN_SIZE torch stays on the calling thread. Above it, it wakes
# a team of threads for every copy, which fight the reader threads for the cores and lose more than they win.
_SERIAL_ELEMENTS = 32768 - 64


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
    by_device: dict[int | None, list[ConvertedBox]] = {}
    for box in boxes:
        _check_internal_overlap(box.target)
        by_device.setdefault(served_device(box.target), []).append(box)
    stats: list[_native.Stats] = []
    for device, of_device in by_device.items():
        if device is None:
            stats += _place_through_host(of_device, layouts, options, buffer_bytes)
        else:
            stats.append(_place_through_device(device, of_device, layouts, options, cuda))
    return stats


# Through bounce buffers on the host


def _place_through_host(
    boxes: list[ConvertedBox], layouts: _native.Layouts, options: _native.Options, buffer_bytes: int
) -> list[_native.Stats]:
    # torch has a current stream for each thread. Copies to a device must use the caller's, so they stay on this thread.
    on_host = all(box.target.device.type == "cpu" for box in boxes)
    threads = layouts.threads(options) if on_host else 1
    capacity = max(min(_BATCH_BYTES, buffer_bytes // threads), _LEAST_BATCH_BYTES)
    batches = _Shared(batches_of(boxes, capacity))
    of_thread = options.share(threads, threads=1, mapped=False)
    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own too: they get the caller's
    stats: list[_native.Stats] = []

    def work() -> None:
        try:
            # On the CPU, though the caller may have made another device the default one.
            buffer = _allocate(capacity, torch.device("cpu"))
            with torch.inference_mode(inference):
                while (parts := batches.take()) is not None:
                    stats.append(_place_batch(Batch(parts, buffer, HOST), layouts, of_thread))
        except BaseException:
            batches.stop()
            raise

    _run_in_threads(threads, work, batches.stop)
    return stats


class _Shared:
    """Batches that several threads take one by one."""

    def __init__(self, batches: Iterator[list[Part]]) -> None:
        self._batches = batches
        self._lock = threading.Lock()
        self._stopped = False

    def take(self) -> list[Part] | None:
        """The next batch; None if there is none, or if a thread has stopped the others."""
        with self._lock:
            return None if self._stopped else next(self._batches, None)

    def stop(self) -> None:
        self._stopped = True


def _run_in_threads(count: int, work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run a function in threads, in fewer where the system is out of them, and raise what it raises in any.

    Args:
        stop: makes the function return soon. It is called after Ctrl-C, which only this thread notices.
    """
    if count == 1:
        work()
        return
    with ThreadPoolExecutor(max_workers=count, thread_name_prefix="dcp_fast") as executor:
        futures: list[Future[None]] = []
        try:
            for _ in range(count):
                try:
                    futures.append(executor.submit(work))
                except RuntimeError:  # no more threads
                    break
            if not futures:
                work()
            for future in futures:
                future.result()
        except BaseException:
            stop()  # the end of this block waits for all threads
            raise


def _place_batch(batch: Batch, layouts: _native.Layouts, options: _native.Options) -> _native.Stats:
    program = batch.program(layouts)
    stats = program.run(0, options)
    # A buffer has the stored dtype, and lies where the engine can write. What was left out would be converted from
    # memory that nobody filled.
    assert not program.converted(0)
    assert not program.fallback(0)
    with span(options.recorder, "convert", stats.bytes_placed):
        _copy_on_host(batch.copies)
    return stats


def _copy_on_host(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """``copy_`` each source to its target, on the calling thread alone."""
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for target, source in copies:
        if not is_plain(target) or not target.is_cpu:
            target.copy_(source)
            continue
        if target.numel() <= _SERIAL_ELEMENTS:
            targets.append(target)
            sources.append(source)
            continue
        if target.is_contiguous() and source.is_contiguous():
            target, source = target.view(-1), source.view(-1)
        step = max(1, _SERIAL_ELEMENTS * target.size(0) // target.numel())
        targets += torch.split(target, step)
        sources += torch.split(source, step)
    # copy_ for each pair, in one call: else the threads spend their time passing the interpreter lock around.
    if targets:
        foreach_copy_(targets, sources)


# Through staging memory on a device


def _place_through_device(
    device: int, boxes: list[ConvertedBox], layouts: _native.Layouts, options: _native.Options, cuda: CudaLoad
) -> _native.Stats:
    # Half of the limit is for slots of the pinned ring; each half of this memory gets half of the rest.
    most = cuda.limits.device_staging_bytes // 4 // ALIGNMENT * ALIGNMENT
    capacity = min(most, sum(map(bytes_of, boxes)) + ALIGNMENT)
    memory = _allocate(2 * capacity, torch.device("cuda", device))
    halves = memory[:capacity], memory[capacity:]
    cuda.conversion_bytes = max(cuda.conversion_bytes, 2 * capacity)
    batches = [Batch(parts, halves[i % 2], device) for i, parts in enumerate(batches_of(boxes, capacity))]

    def convert(i: int) -> None:
        # torch's allocator may give the memory away after this. Its streams see to it that this copy is done before.
        for target, source in batches[i].copies:
            target.copy_(source)

    return cuda.run_in_turns([batch.program(layouts) for batch in batches], options, device, convert)


def _allocate(capacity: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(capacity, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise CudaOutOfMemoryError(
            f"{capacity} bytes of staging memory on {device} could not be had: {error}"
        ) from error
    except RuntimeError as error:  # what torch's allocator raises on the CPU
        raise MemoryError(f"{capacity} bytes for a bounce buffer could not be had") from error


def _check_internal_overlap(target: torch.Tensor) -> None:
    """Raise where copy_ would: in pieces it might not notice."""
    if target.layout is torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(target.size(), target.stride(), strict=True)
    ):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
