"""The control interface of the simulated driver: what a test asks and tells it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any


class Simulator:
    """Typed calls of the C interface that a simulated driver exports and a real one lacks."""

    def __init__(self, path: str | None = None) -> None:
        """Open the library at a path, or else the one that DCP_FAST_LIBCUDA names."""
        self._library = ctypes.CDLL(path or os.environ["DCP_FAST_LIBCUDA"])
        text, number, real, count = ctypes.c_char_p, ctypes.c_int, ctypes.c_double, ctypes.c_long
        self._set = self._function("simcuda_set", number, text, real)
        self._fault = self._function("simcuda_fault", None, text, number, number, number)
        self._calls = self._function("simcuda_calls", count, text)
        self._reports = self._function("simcuda_reports", number, text, text, number, number)
        self._leaks = self._function("simcuda_leaks", number, text, number)
        self._busy_seconds = self._function("simcuda_busy_seconds", real, number, text, number)
        self._statistic = self._function("simcuda_statistic", count, text, number, number)
        self._reset = self._function("simcuda_reset", None)
        self._kernel_coverage = self._function("simcuda_kernel_coverage", number, text, number)

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        function = getattr(self._library, name)
        function.restype = result
        function.argtypes = arguments
        return function

    def set(self, key: str, value: float) -> None:
        """Change a property of the model: copy_gbps, latency_us, jitter_us, late, memory_mb, seed or races."""
        if self._set(key.encode(), value) == 0:
            raise KeyError(key)

    def fault(self, function: str, nth_from_now: int, error: int, *, asynchronous: bool = False) -> None:
        """Let the n-th next call of a driver function fail, or, if asynchronous, the work that it enqueues."""
        self._fault(function.encode(), nth_from_now, error, int(asynchronous))

    def calls(self, function: str = "") -> int:
        """How often a driver function was called; without a name: all of them."""
        return int(self._calls(function.encode()))

    def reports(self, containing: str = "", *, clear: bool = False) -> list[str]:
        """What the checks have found, as far as it contains a text; `clear` forgets all of it."""
        buffer = ctypes.create_string_buffer(1 << 22)
        self._reports(containing.encode(), buffer, len(buffer), int(clear))
        return buffer.value.decode().splitlines()

    def leaks(self) -> dict[str, int]:
        """How many objects are alive of each kind, such as "device allocations" or "events"."""
        buffer = ctypes.create_string_buffer(1 << 12)
        self._leaks(buffer, len(buffer))
        counts = (entry.split(" ", 1) for entry in buffer.value.decode().split(", ") if entry)
        return {kind: int(count) for count, kind in counts}

    def busy_seconds(self, device: int, kind: str, *, reset: bool = False) -> float:
        """The modelled time that a device's "copy" or "kernel" engine was busy."""
        return float(self._busy_seconds(device, kind.encode(), int(reset)))

    def statistic(self, name: str, device: int = -1, *, reset: bool = False) -> int:
        """A counter of a device, or of all: "copies", "bytes_to_device", "launches", "boxes"."""
        return int(self._statistic(name.encode(), device, int(reset)))

    def reset(self) -> None:
        """Forget sticky errors, reports, faults and counters."""
        self._reset()

    def kernel_coverage(self) -> tuple[int, list[str]]:
        """The executed instructions in percent, and the lines that never were."""
        buffer = ctypes.create_string_buffer(1 << 20)
        percent = int(self._kernel_coverage(buffer, len(buffer)))
        return percent, buffer.value.decode().splitlines()
