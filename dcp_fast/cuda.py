"""Destinations on GPUs: which tensors those are, what a load holds of them, and the staging that loads share."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from dcp_fast import _native
from dcp_fast.report import LoadReport
from dcp_fast.trace import span

__all__ = ["CudaLimits", "CudaLoad", "device_of", "release_staging"]


def device_of(tensor: torch.Tensor) -> int | None:
    """The ordinal of the CUDA device that holds a tensor's memory; None for the host and for all other devices."""
    # Under ROCm torch calls its devices by the same name, but they have another driver.
    return tensor.get_device() if tensor.is_cuda and torch.version.hip is None else None


@dataclass(frozen=True)
class CudaLimits:
    """What a load may use on its way to GPUs.

    Attributes:
        pinned_bytes: host memory that copies come from.
        device_staging_bytes: memory on each device for boxes that are placed there by a kernel or converted.
        block_bytes: the most that one slot of the ring carries.
        synchronize: whether the host waits for the last copy.
    """

    pinned_bytes: int
    device_staging_bytes: int
    block_bytes: int
    synchronize: bool


# Staging that no load uses, by limits: one at the most. Pinning memory takes longer than filling it.
_Idle = tuple[CudaLimits, _native.CudaStaging]
_idle: _Idle | None = None
_lock = threading.Lock()


def _exchange(idle: _Idle | None) -> _Idle | None:
    """Put staging in place of what is idle, which is returned: to free it takes longer than a lock should be held."""
    global _idle
    with _lock:
        before, _idle = _idle, idle
    return before


def release_staging() -> None:
    """Free the pinned memory and the device memory that loads to GPUs keep for the next one.

    Waits for copies that a load without ``synchronize`` has left under way. A load that goes on in another thread keeps
    what it has until its end. The next load to a GPU allocates anew.
    """
    _exchange(None)


def _forget() -> None:
    global _idle, _lock
    _idle, _lock = None, threading.Lock()


# While the driver still answers: destructors of the interpreter's last moments come too late.
atexit.register(release_staging)
# A child has no driver, and perhaps a lock that nobody will open any more.
os.register_at_fork(after_in_child=_forget)


class CudaLoad:
    """What one load holds of GPUs. Touches none of them before the first destination on one is met.

    Attributes:
        limits: of memory.
        conversion_bytes: device memory that boxes of another dtype pass through.
    """

    def __init__(self, limits: CudaLimits, report: LoadReport) -> None:
        self.limits = limits
        self.report = report
        self.conversion_bytes = 0
        self._staging: _native.CudaStaging | None = None
        self._options: _native.Options | None = None
        self._started = 0.0
        self._read_before = 0.0
        self._devices: set[int] = set()

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let the memory of destinations outlive a load that does not wait for its last copy."""
        if self.limits.synchronize:
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
        """
        if self._staging is None:
            self._staging = _lease(self.limits)
            self._options = options
            self._started = time.perf_counter()
            self._read_before = options.reading_seconds
        self._devices.update(devices)
        streams = _current_streams(devices)
        try:
            return program.run(wave, options, self._staging, streams)
        except _native.NativeError as error:
            kind, _, _, record, *_ = error.args
            if kind != "cuda_out_of_memory" or record >= 0:
                raise
        # Nothing is written yet, and torch may hold memory that it does not use.
        torch.cuda.empty_cache()
        return program.run(wave, options, self._staging, streams)

    def finish(self) -> None:
        """Wait for the devices if that was asked for, and let the next load have the staging."""
        if self._staging is None:
            return
        if self.limits.synchronize:
            start = time.perf_counter()
            recorder = self._options.recorder if self._options else None
            with self.report.stage("transfer"), span(recorder, "wait for devices"):
                self._staging.synchronize(_current_streams(self._devices))
            self.report.wait_seconds["device"] += time.perf_counter() - start
        self._count()
        staging, self._staging = self._staging, None
        _exchange((self.limits, staging))

    def abort(self) -> None:
        """After an error: no device writes to a destination any more when this returns."""
        staging, self._staging = self._staging, None
        if staging is None:
            return
        staging.drain()
        for device in self._devices:
            with suppress(RuntimeError):  # of a context that is broken: nothing is under way there
                torch.cuda.current_stream(device).synchronize()  # conversions

    def _count(self) -> None:
        assert self._staging is not None
        stats = self._staging.take_stats()
        if self._options is not None and self.limits.synchronize:
            reading = self._options.reading_seconds - self._read_before
            self.report.overlap_efficiency = max(reading, stats.copy_seconds) / (time.perf_counter() - self._started)
        self.report.bytes_to_device += stats.bytes_copied
        self.report.device_copies += stats.copies
        self.report.launches += stats.launches
        self.report.copying_seconds += stats.copy_seconds
        self.report.wait_seconds["slot"] += self._staging.take_slot_seconds()
        self.report.pinned_bytes = self._staging.pinned_bytes
        self.report.device_staging_bytes = self._staging.device_bytes + self.conversion_bytes


def _current_streams(devices: Iterable[int]) -> dict[int, int]:
    return {device: torch.cuda.current_stream(device).cuda_stream for device in devices}


def _lease(limits: CudaLimits) -> _native.CudaStaging:
    idle = _exchange(None)
    if idle is not None and idle[0] == limits:
        return idle[1]
    del idle  # frees what it holds, before as much is allocated anew
    return _native.CudaStaging(
        pinned_bytes=limits.pinned_bytes,
        # The other half is for boxes that torch converts.
        device_bytes=limits.device_staging_bytes // 2,
        block_bytes=limits.block_bytes,
    )
