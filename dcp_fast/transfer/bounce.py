"""Bounce buffers on the host: each reader thread reads a batch of boxes into its own, and empties it at once.

The bytes are then still in the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from dcp_fast import _native
from dcp_fast._torch import foreach_copy_
from dcp_fast.transfer.batches import ALIGNMENT
from dcp_fast.transfer.destinations import is_plain
from dcp_fast.transfer.staging_memory import allocate

T = TypeVar("T")

# What one thread reads before it converts. Each batch costs some 30 us of Python, which threads pay one at a time; past
# this size the bytes leave the last-level cache before they are converted. Measured: 1 MiB 0.36 s of CPU for 1.9 GB,
# 2 MiB 0.32, 4 MiB 0.29, 8 MiB 0.32.
_BATCH_BYTES = 4 << 20
_LEAST_BATCH_BYTES = 16 * ALIGNMENT
# Elements of one copy_ on the CPU: below at::internal::GRAIN_SIZE torch stays on the calling thread. Above it, it wakes
# a team of threads for every copy, which fight the reader threads for the cores and lose more than they win.
_SERIAL_ELEMENTS = 32768 - 64


def place_in_threads(
    batches_of: Callable[[int], Iterator[T]],
    place: Callable[[T, torch.Tensor, _native.Options], _native.Stats],
    threads: int,
    options: _native.Options,
    buffer_bytes: int,
) -> list[_native.Stats]:
    """Place batches, each through a buffer.

    Args:
        batches_of: the batches, for buffers of so many bytes.
        place: reads a batch into a buffer and empties it, in any thread. It gets the options to read by.
        threads: how many work at it. torch has a current stream for each thread. Copies to a device must use the
            caller's, so they stay on this thread: then it is 1.
        options: for reading.
        buffer_bytes: for all buffers together.

    Returns:
        What was read, batch by batch.

    Raises:
        MemoryError: there is no memory for a buffer.
        Exception: what ``place`` raises.
    """
    capacity = max(min(_BATCH_BYTES, buffer_bytes // threads), _LEAST_BATCH_BYTES)
    batches = _Shared(batches_of(capacity))
    of_thread = options.share(threads, threads=1, mapped=False)
    inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own too: they get the caller's
    stats: list[_native.Stats] = []

    def work() -> None:
        try:
            # On the CPU, though the caller may have made another device the default one.
            buffer = allocate(capacity, torch.device("cpu"))
            with torch.inference_mode(inference):
                while (batch := batches.take()) is not None:
                    stats.append(place(batch, buffer, of_thread))
        except BaseException:
            batches.stop()
            raise

    _run_in_threads(threads, work, batches.stop)
    return stats


class _Shared(Generic[T]):
    """Batches that several threads take one by one."""

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches
        self._lock = threading.Lock()
        self._stopped = False

    def take(self) -> T | None:
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


def copy_on_host(copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
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


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether any thread may write to a tensor."""
    return tensor.device.type == "cpu"


def check_internal_overlap(target: torch.Tensor) -> None:
    """Raise where copy_ would: in pieces it might not notice."""
    if target.layout is torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(target.size(), target.stride(), strict=True)
    ):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
