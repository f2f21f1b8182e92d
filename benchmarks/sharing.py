"""Ranks that share reads, through storage of one bandwidth for all of them: when does that pay?

Reads of all ranks wait for one bandwidth, as those of clients of a file server do, and each request for a latency, as
those of an object store do (``_native.SlowStorage``). The limit is the time in which the storage gives each byte once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sharing_ranks import LAYOUTS, RANKS, WAYS, Case, Load, run_ranks, save
from benchmarks.verify import VerificationError

NAME = "sharing"
TITLE = f"loads of {RANKS} ranks that share reads, through storage of several bandwidths and latencies"

_TENSORS, _ROWS, _COLUMNS = 16, 8192, 1024  # 512 MiB at scale 1
_ITEMSIZE = 4
_ROUNDS = 3
_GIGABYTE = 1e9
# What storages give in a second, and what each request waits on top of that. 0 and 0: the page cache.
STORAGES = (
    *((bandwidth * _GIGABYTE, 0.0) for bandwidth in (0.1, 0.3, 0.5, 1, 2, 10)),
    *((1 * _GIGABYTE, latency) for latency in (0.01, 0.1)),
    (0.0, 0.0),
)
# torch, which would take minutes, is loaded with through these alone.
_WITH_TORCH = {Case("whole by all", 0.1 * _GIGABYTE)}


@dataclass(frozen=True)
class Measurement:
    """All loads of one case, by the way."""

    case: Case
    stored_bytes: int
    loads: dict[str, list[Load]]

    def seconds(self, way: str) -> float | None:
        loads = self.loads.get(way)
        return statistics.median(load.seconds for load in loads) if loads else None

    @property
    def limit(self) -> float | None:
        """Seconds in which the storage gives each byte once, with all requests under way at the same time."""
        if not self.case.bytes_per_second:
            return None
        return self.stored_bytes / self.case.bytes_per_second + self.case.latency_seconds


def run(data: Path, scale: float, rounds: int | None, say: Callable[[str], None]) -> list[Measurement]:
    rows = max(RANKS, round(_ROWS * scale) // RANKS * RANKS)
    checkpoint = data / f"sharing_{rows}"
    if not (checkpoint / ".metadata").exists():
        save(checkpoint, _TENSORS, rows, _COLUMNS)
    stored = _TENSORS * rows * _COLUMNS * _ITEMSIZE
    measurements = []
    for layout in LAYOUTS:
        for bandwidth, latency in STORAGES:
            case = Case(layout, bandwidth, latency)
            ways = WAYS if case in _WITH_TORCH else tuple(way for way in WAYS if way != "torch")
            measurement = Measurement(case, stored, run_ranks(checkpoint, case, ways, rounds or _ROUNDS))
            if any(load.differing for loads in measurement.loads.values() for load in loads):
                raise VerificationError(f"{layout}: ranks load something else than torch does")
            measurements.append(measurement)
            times = (f"{way} {measurement.seconds(way):.3f} s" for way in ways)
            say(f"  {layout}, {_storage(case)}: {', '.join(times)}")
    return measurements


HEADINGS = (
    f"{RANKS} ranks that share reads",
    "storage",
    "torch s",
    "each alone s",
    "shared s",
    "alone / shared",
    "shared / limit",
    "overlap",
    "read once",
    "received / needed",
    "most / mean",
)


def table_lines(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One for each case, under HEADINGS."""
    lines = []
    # From the page cache nobody waits for reads: what is left is the exchange.
    exchanges = {m.case.layout: m.seconds("shared") for m in measurements if not m.case.bytes_per_second}
    for measurement in measurements:
        torch, alone, shared = (measurement.seconds(way) for way in WAYS)
        assert alone is not None
        assert shared is not None
        last = measurement.loads["shared"][-1]
        limit, exchange = measurement.limit, exchanges.get(measurement.case.layout)
        lines.append(
            [
                measurement.case.layout,
                _storage(measurement.case),
                "-" if torch is None else f"{torch:.3f}",
                f"{alone:.3f}",
                f"{shared:.3f}",
                f"{alone / shared:.2f}",
                "-" if limit is None else f"{shared / limit:.2f}",
                "-" if limit is None or exchange is None else f"{max(limit, exchange) / shared:.2f}",
                f"{last.read_bytes / measurement.stored_bytes:.3f}",
                f"{last.received_bytes / last.needed_bytes:.3f}",
                f"{last.most_read_bytes * RANKS / last.read_bytes:.2f}",
            ]
        )
    return lines


def _storage(case: Case) -> str:
    if not case.bytes_per_second:
        return "page cache"
    latency = f", {case.latency_seconds * 1e3:g} ms" if case.latency_seconds else ""
    return f"{case.bytes_per_second / _GIGABYTE:g} GB/s{latency}"
