"""What a load did: bytes, requests and seconds by stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["LoadReport", "last_report"]

logger = logging.getLogger("dcp_fast")

STAGES = ("metadata", "planning", "layout", "transfer", "commit")


@dataclass
class LoadReport:
    """Figures of one load on this rank.

    Attributes:
        path: the checkpoint.
        bytes_needed: payload bytes of all boxes that this rank asked for, in their stored dtype, and of bytes entries.
        bytes_read: bytes that storage was asked for, headers and gaps included; the metadata file is left out.
        requests: read calls that fetched them.
        records: stored entries that were touched.
        fallback_records: how many of those torch.load had to read.
        staged_items: boxes that passed through staging to be placed by torch (another dtype or device).
        seconds: by stage. metadata: reading `.metadata`. planning: from there to the local plan. layout: finding
            payloads. transfer: reading and placing tensors. commit: bytes entries and planner hooks.
    """

    path: str = ""
    bytes_needed: int = 0
    bytes_read: int = 0
    requests: int = 0
    records: int = 0
    fallback_records: int = 0
    staged_items: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def read_amplification(self) -> float:
        """Bytes read from storage per byte needed; 0 if nothing was needed."""
        return self.bytes_read / self.bytes_needed if self.bytes_needed else 0.0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def gigabytes_per_second(self) -> float:
        """Needed bytes per second of all stages, in units of 10^9 bytes; 0 if no time passed."""
        total = self.total_seconds
        return self.bytes_needed / total / 1e9 if total else 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent within to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def __str__(self) -> str:
        rows = [
            ("bytes needed", f"{self.bytes_needed:,}"),
            ("bytes read", f"{self.bytes_read:,}"),
            ("read amplification", f"{self.read_amplification:.3f}"),
            ("requests", f"{self.requests:,}"),
            ("records", f"{self.records:,}"),
            ("fallback records", f"{self.fallback_records:,}"),
            ("staged items", f"{self.staged_items:,}"),
            *((f"{name} (s)", f"{self.seconds[name]:.3f}") for name in STAGES),
            ("total (s)", f"{self.total_seconds:.3f}"),
            ("GB/s", f"{self.gigabytes_per_second:.2f}"),
        ]
        left = max(len(name) for name, _ in rows)
        right = max(len(value) for _, value in rows)
        lines = [f"load of {self.path}", *(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)]
        return "\n".join(lines)


_last: LoadReport | None = None


def last_report() -> LoadReport | None:
    """The report of the load that began last in this process, also of one that failed; None before the first."""
    return _last


def begin(report: LoadReport) -> None:
    """Make a report the last one while its load goes on."""
    global _last
    _last = report


def publish(report: LoadReport) -> None:
    """Make a report the last one and log it."""
    begin(report)
    logger.info("%s", report)
