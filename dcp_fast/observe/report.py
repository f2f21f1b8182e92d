"""What a load did: bytes, requests and seconds by stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from dcp_fast.observe.trace import Timeline

__all__ = ["LoadReport", "last_report"]

logger = logging.getLogger("dcp_fast")

STAGES = ("metadata", "planning", "layout", "transfer", "commit")
WAITS = ("disk", "slot", "device")


@dataclass
class LoadReport:
    """Figures of one load on this rank.

    Attributes:
        path: the checkpoint.
        metadata_received: whether another rank read the metadata and sent its bytes here (``share_metadata``).
        bytes_needed: payload bytes of all boxes that this rank asked for, in their stored dtype, and of bytes entries.
        bytes_read: bytes that storage was asked for, headers and gaps included; the metadata file is left out.
        requests: read calls that fetched them.
        records: stored entries that were touched.
        fallback_records: how many of those torch.load had to read.
        device_fallback_items: boxes for GPUs that torch's ``copy_`` brought there, from memory that is not pinned, as
            the driver refused what it takes to do better; device_fallback_reason: what that was.
        staged_items: boxes that passed through staging to be placed by torch (another dtype or device).
        bytes_to_device: bytes that were copied from the host to GPUs, descriptors of boxes included.
        device_copies: how many copies brought them there.
        launches: of the kernel that places boxes on a GPU.
        pinned_bytes, device_staging_bytes: memory that these copies went through, on the host and on the GPU that held
            most; it is kept for the next load.
        copying_seconds: that the copies took on the GPU where they took longest. Without ``synchronize`` the last few
            copies are not counted.
        overlap_efficiency: how well reading and copying overlapped: the time of whichever took longer per time of both,
            from the beginning of the first read, preparations on the GPU included, to the last copy; 0 without
            destinations on GPUs, and without ``synchronize``.
        seconds: by stage. metadata: reading `.metadata`. planning: from there to the local plan. layout: finding
            payloads. transfer: reading and placing tensors. commit: bytes entries and planner hooks.
        reading_seconds: the time in which at least one read call was under way, in any thread; as with ``bytes_read``,
            without the metadata file.
        wait_seconds: what threads waited for, summed over threads, so that it may exceed the time of the load.
            disk: read calls. slot: free pinned memory. device: copies and kernels. The last two are 0 on the CPU.
    """

    path: str = ""
    metadata_received: bool = False
    bytes_needed: int = 0
    bytes_read: int = 0
    requests: int = 0
    records: int = 0
    fallback_records: int = 0
    staged_items: int = 0
    device_fallback_items: int = 0
    device_fallback_reason: str = ""
    bytes_to_device: int = 0
    device_copies: int = 0
    launches: int = 0
    pinned_bytes: int = 0
    device_staging_bytes: int = 0
    copying_seconds: float = 0.0
    overlap_efficiency: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    reading_seconds: float = 0.0
    wait_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAITS, 0.0))

    # Not a field, and gone after the load: a report is data, to be sent and copied.
    _timeline: ClassVar[Timeline | None] = None

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
            self.add_stage(name, start)

    def trace_stages(self, timeline: Timeline) -> None:
        """Put each stage on a timeline, until the report is published."""
        vars(self)["_timeline"] = timeline

    def add_stage(self, name: str, start: float) -> None:
        """Add the time since ``start``, of ``time.perf_counter``, to a stage."""
        seconds = time.perf_counter() - start
        self.seconds[name] += seconds
        if self._timeline is not None:
            self._timeline.add_stage(name, seconds)

    def __str__(self) -> str:
        rows = [
            ("bytes needed", f"{self.bytes_needed:,}"),
            ("bytes read", f"{self.bytes_read:,}"),
            ("read amplification", f"{self.read_amplification:.3f}"),
            ("requests", f"{self.requests:,}"),
            ("records", f"{self.records:,}"),
            ("fallback records", f"{self.fallback_records:,}"),
            ("staged items", f"{self.staged_items:,}"),
            ("metadata", "received" if self.metadata_received else "read"),
            *((f"{name} (s)", f"{self.seconds[name]:.3f}") for name in STAGES),
            ("total (s)", f"{self.total_seconds:.3f}"),
            ("reading (s)", f"{self.reading_seconds:.3f}"),
            *((f"waiting for {name} (s, all threads)", f"{self.wait_seconds[name]:.3f}") for name in WAITS),
            ("GB/s", f"{self.gigabytes_per_second:.2f}"),
        ]
        if self.device_fallback_items:
            rows.append(("device fallback items", f"{self.device_fallback_items:,}"))
        if self.device_copies:
            rows += [
                ("bytes to device", f"{self.bytes_to_device:,}"),
                ("device copies", f"{self.device_copies:,}"),
                ("launches", f"{self.launches:,}"),
                ("pinned bytes", f"{self.pinned_bytes:,}"),
                ("device staging bytes", f"{self.device_staging_bytes:,}"),
                ("copying (s)", f"{self.copying_seconds:.3f}"),
                ("overlap efficiency", f"{self.overlap_efficiency:.2f}"),
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
    vars(report).pop("_timeline", None)
    logger.info("%s", report)
