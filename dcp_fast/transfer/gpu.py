"""Loads to GPUs: the staging that loads use one after another, and what one load holds of it.

Staging is the pinned ring, the staging memory on each device and the kernel (docs/glossary.md). To allocate it takes
longer than to fill it, so a load leaves it to the next one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TypeVar

import torch

from dcp_fast import _native
from dcp_fast.errors import typed_errors
from dcp_fast.observe.report import LoadReport
from dcp_fast.observe.trace import span
from dcp_fast.transfer.batches import ALIGNMENT
from dcp_fast.transfer.devices import device_of, refusals
from dcp_fast.transfer.staging_limits import StagingLimits
from dcp_fast.transfer.staging_memory import allocate

logger = logging.getLogger("dcp_fast")

Result = TypeVar("Result")

_MOST_HALF_BYTES = 1 << 30  # one launch of a kernel takes elements that a 32-bit number counts


# Staging that no load uses, by limits: one at the most. Pinning memory takes longer than filling it.
_Idle = tuple[StagingLimits, _native.PinnedRing]
_idle: _Idle | None = None
_lock = threading.Lock()


def _swap_idle(idle: _Idle | None) -> _Idle | None:
    """Replace the idle staging, and return it. The caller frees it, which takes longer than the lock should be held."""
    global _idle
    with _lock:
        before, _idle = _idle, idle
    return before


def prepare_staging(
    devices: Iterable[int | torch.device] | None = None,
    *,
    threads: int | None = None,
    block_bytes: int | None = None,
    pinned_bytes: int | None = None,
    device_staging_bytes: int | None = None,
) -> None:
    """Do now what the first load to GPUs would have to do: pin host memory, allocate on the devices, load the kernel.

    Call it while the model is being built, for instance. :func:`release_staging` undoes it. If the driver of a device
    refuses, this function logs why, and loads bring bytes to that device by torch's ``copy_``.

    Args:
        devices: which ones, as ordinals or devices. None: torch's current device of the calling thread.
        threads, block_bytes, pinned_bytes, device_staging_bytes: as for :class:`dcp_fast.FileSystemReader`. Give the
            same ones to the reader of the load. If they differ, that load allocates anew.

    Raises:
        CudaError: a call of the driver failed.
        CudaOutOfMemoryError: there is not memory enough on a device.
    """
    limits = StagingLimits.of(threads, block_bytes, pinned_bytes, device_staging_bytes)
    wanted = [torch.cuda.current_device()] if devices is None else [_ordinal(device) for device in devices]
    with typed_errors():
        count = torch.cuda.device_count()  # staging.prepare raises for ordinals that are too large
        _native.require_not_capturing(_current_streams(device for device in wanted if device < count))
        staging = _lease(limits)
        try:
            for device in wanted:
                refusals.pop(device, None)
                with suppress(CudaRefusedError), _told_refusals([device]):
                    staging.prepare(device)
            if any(device not in refusals for device in wanted):
                _swap_idle((limits, staging))
        finally:
            del staging  # else the traceback of an error would keep it alive


def _ordinal(device: int | torch.device) -> int:
    if isinstance(device, int):
        return device
    return torch.cuda.current_device() if device.index is None else device.index


def release_staging() -> None:
    """Free the pinned memory and the device memory that loads to GPUs keep for the next one.

    Waits for copies that a load without ``synchronize`` has left under way. A load that goes on in another thread keeps
    what it has until its end. The next load to a GPU allocates anew, and asks the driver anew for what it refused.
    """
    _swap_idle(None)
    refusals.clear()


def _forget() -> None:
    global _idle, _lock
    _idle, _lock = None, threading.Lock()


# At exit, while the driver still answers. It no longer does when the interpreter destroys what is left.
atexit.register(release_staging)
# A forked child cannot use the parent's driver. Its copy of the lock may be held by a thread that it does not have.
os.register_at_fork(after_in_child=_forget)


class CudaRefusedError(Exception):
    """The driver refuses pinned memory or the kernel. A load can still go another way."""


@contextmanager
def _told_refusals(devices: Iterable[int]) -> Iterator[None]:
    """Remember and log a refusal of the driver, and raise it as CudaRefusedError."""
    try:
        yield
    except _native.NativeError as error:
        if error.kind != "cuda_refused":
            raise
        # Pinned memory is for all devices, the kernel for one.
        for device in devices if error.device < 0 else [error.device]:
            if device not in refusals:
                refusals[device] = error.reason
                logger.warning("Loads to cuda:%d go through torch's copy_, which is slower: %s", device, error.reason)
        raise CudaRefusedError(error.reason) from None


class CudaLoad:
    """What one load holds for its destinations on GPUs. It touches no GPU before the first of these.

    Attributes:
        synchronize: whether the host waits for the last copy.
        conversion_bytes: device memory that boxes of another dtype pass through.
    """

    def __init__(self, limits: Callable[[], StagingLimits], synchronize: bool, report: LoadReport) -> None:
        self._find_limits = limits
        self.synchronize = synchronize
        self.report = report
        self.conversion_bytes = 0
        self._staging: _native.PinnedRing | None = None
        self._options: _native.Options | None = None
        self._started = 0.0
        self._read_before = 0.0
        self._devices: set[int] = set()

    @cached_property
    def limits(self) -> StagingLimits:
        """How much memory this load may use. Found when it is needed: it takes reading files about control groups."""
        return self._find_limits()

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let the memory of destinations outlive a load that does not wait for its last copy."""
        if self.synchronize:
            return
        for tensor in tensors:
            # Torch's current stream waits for ours: what it is done with, all are done with.
            if (device := device_of(tensor)) is not None:
                tensor.record_stream(torch.cuda.current_stream(device))

    def run(
        self, program: _native.Program, wave: int, options: _native.Options, devices: Iterable[int]
    ) -> _native.Stats:
        """Run a wave of a program that has destinations on the devices.

        Torch's current streams on them are ahead of it and behind it: what is launched there later finds all in place.

        Args:
            program: what to run.
            wave: which of its waves.
            options: for reading.
            devices: ordinals.

        Raises:
            CudaRefusedError: it can only be run with destinations elsewhere. Some boxes may be in place.
            NativeError: see :func:`dcp_fast.errors.typed_errors`.
        """
        return self._run(lambda streams: program.run(wave, options, self._staging, streams), options, list(devices))

    def prepare(self, devices: Iterable[int]) -> None:
        """Have all that loads to the devices need, before ranks depend on each other.

        Raises:
            CudaRefusedError: a load can only be run with destinations elsewhere.
            NativeError: see :func:`dcp_fast.errors.typed_errors`.
        """

        def work(streams: dict[int, int]) -> None:
            assert self._staging is not None
            for device in streams:
                self._staging.prepare(device)

        self._run(work, None, list(devices))

    def run_step(
        self,
        step: Callable[[_native.PinnedRing | None, dict[int, int]], _native.RoundStats],
        options: _native.Options,
        devices: Iterable[int],
    ) -> _native.RoundStats:
        """Run a step of an exchange that has destinations on the devices. See :meth:`run`.

        Args:
            step: takes the staging and torch's current streams.
            options: for reading.
            devices: ordinals.
        """
        return self._run(lambda streams: step(self._staging, streams), options, list(devices))

    def run_in_turns(
        self,
        programs: Sequence[_native.Program],
        options: _native.Options,
        device: int,
        placed: Callable[[int], None],
    ) -> _native.Stats:
        """Run programs of one wave each, one after another.

        Args:
            programs: what to run.
            options: for reading.
            device: where all destinations lie, as an ordinal.
            placed: called with the number of each program as soon as its boxes are in place. What it enqueues on
                torch's current stream is done before the second program after that one writes anything.

        Raises:
            CudaRefusedError, NativeError: as :meth:`run`.
        """

        def run(streams: dict[int, int]) -> _native.Stats:
            assert self._staging is not None
            return _native.run_programs(programs, options, self._staging, streams, placed)

        return self._run(run, options, [device])

    def _run(
        self, work: Callable[[dict[int, int]], Result], options: _native.Options | None, devices: list[int]
    ) -> Result:
        # The staging is never an argument or a local variable: the traceback of an error would keep it after the load.
        streams = _current_streams(devices)
        # Before anything else: while a graph is captured, even a query of an event invalidates it.
        _native.require_not_capturing(streams)
        if self._staging is None:
            self._staging = _lease(self.limits)
        if self._options is None and options is not None:
            self._options = options
            self._started = time.perf_counter()
            self._read_before = options.reading_seconds
        self._devices.update(devices)
        with _told_refusals(devices):
            try:
                return work(streams)
            except _native.NativeError as error:
                if error.kind != "cuda_out_of_memory" or error.record >= 0:
                    raise
            # Nothing is written yet. torch may hold memory on the device that it does not use: try again without it.
            torch.cuda.empty_cache()
            return work(streams)

    def half_bytes(self, wanted: int) -> int:
        """How many bytes one of the :meth:`halves` has.

        Args:
            wanted: what it would need for all boxes. It gets no more than this load may use.
        """
        # Half of the limit is for slots of the pinned ring; each half of this memory gets half of the rest.
        most = min(self.limits.device_staging_bytes // 4, _MOST_HALF_BYTES) // ALIGNMENT * ALIGNMENT
        return min(most, wanted)

    def halves(self, device: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory on a device for what :meth:`run_in_turns` brings there: one program's boxes in each half.

        Args:
            device: as an ordinal.
            wanted: as of :meth:`half_bytes`.

        Raises:
            CudaOutOfMemoryError: there is no such memory.
        """
        capacity = self.half_bytes(wanted)
        memory = allocate(2 * capacity, torch.device("cuda", device))
        self.conversion_bytes = max(self.conversion_bytes, 2 * capacity)
        return memory[:capacity], memory[capacity:]

    def dequantize(self, device: int, rows: array[int]) -> None:
        """Dequantize boxes on a device, after what its torch's current stream has and ahead of what it gets then.

        Args:
            device: as an ordinal.
            rows: of the boxes, as ``_native.dequantize`` has them.

        Raises:
            CudaRefusedError: there is no kernel.
            NativeError: see :func:`dcp_fast.errors.typed_errors`.
        """
        assert self._staging is not None
        with _told_refusals([device]):
            _native.dequantize_on_device(self._staging, device, _current_streams([device])[device], rows)

    def finish(self) -> None:
        """Wait for the devices if ``synchronize`` is set, and leave the staging to the next load."""
        if self._staging is None:
            if self.synchronize:
                self._wait_for_conversions()
            return
        if self.synchronize:
            start = time.perf_counter()
            recorder = self._options.recorder if self._options else None
            with self.report.stage("transfer"), span(recorder, "wait for devices"):
                self._staging.synchronize(_current_streams(self._devices))
            self.report.wait_seconds["device"] += time.perf_counter() - start
        self._count()
        staging, self._staging = self._staging, None
        _swap_idle((self.limits, staging))

    def give_up(self) -> None:
        """After a refusal: wait until the engine writes to no device any more, and leave nothing to the next load."""
        if self._staging is not None:
            self._staging.drain()
            self._count_copies()
            self._staging = None

    def abort(self) -> None:
        """After an error: no device writes to a destination any more when this returns."""
        if self._staging is not None:
            self._staging.drain()
            self._staging = None
        self._wait_for_conversions()

    def _wait_for_conversions(self) -> None:
        for device in self._devices:
            with suppress(RuntimeError):  # of a context that is broken: nothing is under way there
                torch.cuda.current_stream(device).synchronize()

    def _count(self) -> None:
        copy_seconds = self._count_copies()
        if self._options is not None and self.synchronize:
            reading = self._options.reading_seconds - self._read_before
            self.report.overlap_efficiency = max(reading, copy_seconds) / (time.perf_counter() - self._started)

    def _count_copies(self) -> float:
        """Report what went through the staging. Returns for how long the copies took."""
        assert self._staging is not None
        stats = self._staging.take_stats()
        self.report.bytes_to_device += stats.bytes_copied
        self.report.device_copies += stats.copies
        self.report.launches += stats.launches
        self.report.copying_seconds += stats.copy_seconds
        self.report.wait_seconds["slot"] += self._staging.take_slot_seconds()
        self.report.pinned_bytes = self._staging.pinned_bytes
        self.report.device_staging_bytes = self._staging.device_bytes + self.conversion_bytes
        return stats.copy_seconds


def _current_streams(devices: Iterable[int]) -> dict[int, int]:
    return {device: torch.cuda.current_stream(device).cuda_stream for device in devices}


def _lease(limits: StagingLimits) -> _native.PinnedRing:
    idle = _swap_idle(None)
    if idle is not None and idle[0] == limits:
        return idle[1]
    del idle  # frees what it holds, before as much is allocated anew
    return _native.PinnedRing(
        pinned_bytes=limits.pinned_bytes,
        # The other half is for boxes that torch converts.
        device_bytes=limits.device_staging_bytes // 2,
        block_bytes=limits.block_bytes,
    )
