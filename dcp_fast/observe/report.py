"""What a load did: bytes, requests and seconds by stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

from dcp_fast import _native
from dcp_fast.observe.trace import Timeline
from dcp_fast.this_load import Options, this_load

logger = logging.getLogger("dcp_fast")

STAGES = ("metadata", "planning", "ranks", "layout", "transfer", "commit")
WAITS = ("disk", "slot", "device", "ranks")


@dataclass
class LoadReport:
    """Figures of one load on this rank.

    Attributes:
        path: the checkpoint.
        reader, planner: the classes of the reader and the planner.
        reader_fallback_reason: why the data was read by the reader itself and not by the native engine; empty if it
            was not.
        planner_fallback_reason: why planning took a slower way, or why items were read one by one; empty if neither is
            the case. Items for planners with hooks come in windows (docs/architecture.md), which is no slower way.
        metadata_fallback_reason: why the metadata was unpickled, and not read natively; empty if it was not, and where
            torch's own ``load`` runs the load.
        metadata_received: whether another rank read the metadata and sent its bytes here (``share_metadata``).
        sharing_fallback_reason: why this rank read what it needs, or some of it again, alone, although it was told to
            share reads (``share_reads``); empty if it did share.
        bytes_read_by_job: bytes that all ranks together asked storage for in an exchange (``share_reads``); bytes_sent,
            bytes_received: what this rank exchanged with others; exchange_rounds: in how many rounds. 0 without.
        bytes_needed: payload bytes of all boxes that this rank asked for, in their stored dtype, and of bytes entries.
        bytes_read: bytes that storage was asked for, headers and gaps included; the metadata file is left out.
        bytes_mapped: how many of those were copied from mappings of files in the page cache.
        mapping_fallback_reason: why some were read instead, although they were to be copied from a mapping; empty if
            none were.
        files_shared_on_node: how many files were not in the page cache and were read through it, of which each rank of
            this node began another part, as the ranks need the same bytes.
        requests: read calls that fetched them, and copies from mappings.
        records: how many records the plan needs.
        fallback_records: how many of those torch.load had to read; fallback_reasons: why, and how many for each reason.
        device_fallback_items: boxes for GPUs that torch's ``copy_`` brought there, from memory that is not pinned, as
            the driver refused what it takes to do better; device_fallback_reason: what that was.
        staged_items: boxes that were converted to another dtype, or that passed through staging to be placed by torch
            (another device, a dtype that the engine does not convert, or a planner with hooks on ranks that share
            reads).
        dequantized_items: boxes of quantized tensors, which became numbers on their way.
        bytes_to_device: bytes that were copied from the host to GPUs, descriptors of boxes included.
        device_copies: how many copies brought them there.
        launches: of the kernels that place boxes on a GPU, and dequantize there.
        pinned_bytes, device_staging_bytes: memory that these copies went through, on the host and on the GPU that held
            most; it is kept for the next load.
        copying_seconds: that the copies took on the GPU where they took longest. Without ``synchronize`` the last few
            copies are not counted.
        overlap_efficiency: how well reading and copying overlapped: the time of whichever took longer per time of both,
            from the beginning of the first read, preparations on the GPU included, to the last copy; 0 without
            destinations on GPUs, and without ``synchronize``.
        seconds: by stage; together they are the time of the load. metadata: reading `.metadata`. planning: the state
            dict, and the plan for it. ranks: steps that all ranks take together, which includes waiting for others.
            layout: finding payloads. transfer: reading and placing tensors. commit: bytes entries, planner hooks, and
            giving values back to the state dict.
        reading_seconds: the time in which at least one read call was under way, in any thread; as with ``bytes_read``,
            without the metadata file.
        wait_seconds: what threads waited for, summed over threads, so that it may exceed the time of the load.
            disk: read calls. slot: free pinned memory. device: copies and kernels. These two are 0 on the CPU.
            ranks: other ranks, which were to say what they need, or to be done with a round (``share_reads``).
    """

    path: str = ""
    reader: str = ""
    planner: str = ""
    reader_fallback_reason: str = ""
    planner_fallback_reason: str = ""
    metadata_fallback_reason: str = ""
    metadata_received: bool = False
    sharing_fallback_reason: str = ""
    bytes_read_by_job: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    exchange_rounds: int = 0
    bytes_needed: int = 0
    bytes_read: int = 0
    bytes_mapped: int = 0
    mapping_fallback_reason: str = ""
    files_shared_on_node: int = 0
    requests: int = 0
    records: int = 0
    fallback_records: int = 0
    fallback_reasons: dict[str, int] = field(default_factory=dict)
    staged_items: int = 0
    dequantized_items: int = 0
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

    # No fields: what goes on while the load does. A report is data, and is sent and copied without it.
    _timeline: ClassVar[Timeline | None] = None
    _stage: ClassVar[str] = ""
    _stage_began: ClassVar[int] = 0
    _planned_natively: ClassVar[bool] = False

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @property
    def is_fast(self) -> bool:
        """Whether metadata, plan and data all took the fast way."""
        return not self._fallback_reasons()

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
        """Count the time spent within for a stage, and not for the stage around."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, name: str) -> str:
        """Count time for this stage from now on, or for none if the name is empty. Returns the stage so far."""
        before, now = self._stage, time.perf_counter_ns()
        if name != before:
            if before:
                self.seconds[before] += (now - self._stage_began) / 1e9
                if self._timeline is not None:
                    self._timeline.add_stage(before, self._stage_began, now)
            vars(self).update(_stage=name, _stage_began=now)
        return before

    def note_reads_alone(self, reason: str) -> None:
        """A rank that shares reads something alone. The first reason counts."""
        self.sharing_fallback_reason = self.sharing_fallback_reason or reason

    def note_slow_planner(self, reason: str) -> None:
        """Planning, or calling hooks, took a slower way, unless the reason is empty."""
        known = self.planner_fallback_reason
        self.planner_fallback_reason = f"{known}; {reason}" if known and reason else known or reason

    @property
    def planned_natively(self) -> bool:
        """Whether the plan of this load came from our search, until the report is published."""
        return self._planned_natively

    @planned_natively.setter
    def planned_natively(self, value: bool) -> None:
        vars(self)["_planned_natively"] = value

    @property
    def timeline(self) -> Timeline | None:
        """Where stages are recorded, until the report is published."""
        return self._timeline

    def record(self, path: str) -> Timeline:
        """Record a timeline, to be written to this file when the report is published."""
        stage = self.enter("")
        timeline = Timeline(path, {name: seconds for name, seconds in self.seconds.items() if seconds})
        vars(self)["_timeline"] = timeline
        self.enter(stage)
        return timeline

    def __str__(self) -> str:
        rows = [
            ("bytes needed", f"{self.bytes_needed:,}"),
            ("bytes read", f"{self.bytes_read:,}"),
            ("bytes mapped", f"{self.bytes_mapped:,}"),
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
        if self.files_shared_on_node:
            rows.append(("files shared on the node", f"{self.files_shared_on_node:,}"))
        if self.dequantized_items:
            rows.append(("dequantized items", f"{self.dequantized_items:,}"))
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
        if self.exchange_rounds:
            rows += [
                ("bytes read by all ranks", f"{self.bytes_read_by_job:,}"),
                ("bytes sent", f"{self.bytes_sent:,}"),
                ("bytes received", f"{self.bytes_received:,}"),
                ("exchange rounds", f"{self.exchange_rounds:,}"),
            ]
        left = max(len(name) for name, _ in rows)
        right = max(len(value) for _, value in rows)
        lines = [f"load of {self.path or '?'} by {self.reader or '?'} and {self.planner or '?'}"]
        lines += (f"  {name:<{left}}  {value:>{right}}" for name, value in rows)
        lines += (f"  fallback, {count:,} records: {reason}" for reason, count in self.fallback_reasons.items())
        if self.sharing_fallback_reason:
            lines.append(f"  reads not shared: {self.sharing_fallback_reason}")
        if self.mapping_fallback_reason:
            lines.append(f"  not mapped: {self.mapping_fallback_reason}")
        lines += (f"  not fast: {reason}" for reason in self._fallback_reasons())
        return "\n".join(lines)

    def _fallback_reasons(self) -> list[str]:
        owners = (
            ("metadata", self.metadata_fallback_reason),
            (self.reader, self.reader_fallback_reason),
            (self.planner, self.planner_fallback_reason),
        )
        return [f"{owner}: {reason}" for owner, reason in owners if reason]


def count_stats(report: LoadReport, stats: _native.Stats) -> None:
    """Add to a report what a run of the engine read and converted."""
    report.requests += stats.requests
    report.bytes_read += stats.bytes_read
    report.bytes_mapped += stats.bytes_mapped
    report.mapping_fallback_reason = stats.why_unmapped or report.mapping_fallback_reason
    report.staged_items += stats.converted_items


_last: LoadReport | None = None
_current: ContextVar[LoadReport | None] = ContextVar("dcp_fast_load", default=None)
_logged_reasons: set[str] = set()


def last_report() -> LoadReport | None:
    """The report of the load that began or ended last in this process, even if it failed; None before the first."""
    return _last


@contextmanager
def reported(options: Options = ()) -> Iterator[LoadReport]:
    """What happens within is a load of its own, to whose report readers and planners add their part.

    Args:
        options: those that hold for this load.
    """
    report = LoadReport()
    begin(report)
    token = _current.set(report)
    report.enter("planning")
    try:
        with this_load(options):
            yield report
    finally:
        _current.reset(token)
        publish(report)


@contextmanager
def joined_report() -> Iterator[LoadReport]:
    """What happens within belongs to the load that this thread is in, or is one of its own."""
    report = current_report()
    if report is not None:
        yield report
        return
    with reported() as report:
        yield report


def current_report() -> LoadReport | None:
    """The report of the load that this thread is in; None if nobody but the reader can tell where a load begins."""
    return _current.get()


def begin(report: LoadReport) -> None:
    """Make a report the last one while its load goes on."""
    global _last
    _last = report


def publish(report: LoadReport) -> None:
    """The load of a report has ended: log it, and write its timeline."""
    begin(report)
    report.enter("")
    if report.timeline is not None:
        report.timeline.save()
    for name in ("_timeline", "_stage", "_stage_began", "_planned_natively"):
        vars(report).pop(name, None)
    logger.info("%s", report)
    for reason in report._fallback_reasons():
        if reason not in _logged_reasons:
            _logged_reasons.add(reason)
            logger.info("loads like that of %s are not fast. %s", report.path or "?", reason)
