"""Destinations on GPUs: which tensors those are, what a load holds of them, and the staging that loads share."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Iterable, Sequence
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
_idle: tuple[CudaLimits, _native.CudaStaging] | None = None
# Loads that did not wait for their last copy, and the tensors that they write.
_in_flight: list[tuple[_native.CudaStaging, list[torch.Tensor]]] = []
_lock = threading.Lock()


def release_staging() -> None:
    """Free the pinned memory and the device memory that loads to GPUs keep for the next one.

    Waits for loads that are still under way on a device. The next load to a GPU allocates anew.
    """
    global _idle
    with _lock:
        _idle = None
        _in_flight.clear()


# While the driver still answers: destructors of the interpreter's last moments come too late.
atexit.register(release_staging)


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
        self._tensors: list[torch.Tensor] = []

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Let destinations outlive a load that does not wait for its last copy, whatever becomes of the state dict."""
        if not self.limits.synchronize:
            self._tensors += tensors

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
        return program.run(wave, options, self._staging, _current_streams(devices))

    def finish(self) -> None:
        """Wait for the devices if that was asked for, and let the next load have the staging."""
        if self._staging is None:
            return
        if self.limits.synchronize:
            start = time.perf_counter()
            with (
                self.report.stage("transfer"),
                span(self._options.recorder if self._options else None, "wait for devices"),
            ):
                self._staging.synchronize(_current_streams(self._devices))
            self.report.wait_seconds["device"] += time.perf_counter() - start
        self._count()
        _give_back(self.limits, self._staging, self._tensors)
        self._staging = None

    def abort(self) -> None:
        """After an error: no device writes to a destination any more when this returns."""
        if self._staging is None:
            return
        self._staging.drain()
        self._count()
        self._staging = None

    def _count(self) -> None:
        assert self._staging is not None
        stats = self._staging.take_stats()
        if self._options is not None:
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
    global _idle
    with _lock:
        _in_flight[:] = [entry for entry in _in_flight if entry[0].busy()]
        idle, _idle = _idle, None
    if idle is not None and idle[0] == limits:
        return idle[1]
    del idle  # frees what it holds, before as much is allocated anew
    return _native.CudaStaging(
        pinned_bytes=limits.pinned_bytes,
        # The other half is for boxes that torch converts.
        device_bytes=limits.device_staging_bytes // 2,
        block_bytes=limits.block_bytes,
    )


def _give_back(limits: CudaLimits, staging: _native.CudaStaging, tensors: list[torch.Tensor]) -> None:
    global _idle
    with _lock:
        _idle = (limits, staging)
        if not limits.synchronize:
            _in_flight.append((staging, tensors))
