"""Turns measurements into tables, with verdicts on the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import disk, memory
from benchmarks.fresh import ALLOWED_GROWTH, FirstLoads
from benchmarks.gpu_ceilings import PINNED_COPY, PINNED_READ
from benchmarks.huggingface import LOAD_FILE
from benchmarks.measure import TORCH_THREADS, Measurement
from benchmarks.peers import PEERS
from benchmarks.workloads import MIB, Metric, Target, Temperature

NONE = "-"


@dataclass(frozen=True)
class Row:
    """One line of the table. What was not measured, or has no meaning for the workload, is None."""

    label: str
    cache: str
    torch: float | None
    dcp_fast: float | None
    ceiling_name: str | None
    ceiling: float | None
    # The best raw way of the same bytes from the page cache.
    memory: float | None
    amplification: float | None
    requests: int | None
    records: int | None
    metadata_reads: int | None
    # Bytes copied to GPUs for each byte needed.
    copied: float | None
    gigabytes: float
    targets: tuple[Target, ...]

    @property
    def speedup(self) -> float | None:
        return self.torch / self.dcp_fast if self.torch and self.dcp_fast else None

    @property
    def of_ceiling(self) -> float | None:
        return self.ceiling / self.dcp_fast if self.ceiling and self.dcp_fast else None

    @property
    def of_memory(self) -> float | None:
        return self.memory / self.dcp_fast if self.memory and self.dcp_fast else None

    def value(self, metric: Metric) -> float | None:
        if metric is Metric.OF_CEILING:
            return self.of_ceiling
        if metric is Metric.OF_MEMORY:
            return self.of_memory
        if metric is Metric.AMPLIFICATION:
            return self.amplification
        if metric is Metric.READS_PER_RECORD:
            return self.requests / self.records if self.requests is not None and self.records else None
        if metric is Metric.METADATA_READS:
            return self.metadata_reads
        if metric is Metric.COPIED:
            return self.copied
        return self.speedup

    def verdict(self) -> str:
        """One word for each target, in their order."""
        words = []
        for target in self.targets:
            value = self.value(target.metric)
            words.append(_word(value is not None and target.metric.holds(value, target.bound), value))
        return ", ".join(words)

    def cells(self) -> list[str]:
        return [
            self.label,
            self.cache,
            _number(self.torch, ".3f"),
            _number(self.dcp_fast, ".3f"),
            _number(self.speedup, ".1f", "x"),
            f"{self.ceiling:.3f} {self.ceiling_name}" if self.ceiling is not None else NONE,
            _number(self.of_ceiling, ".2f"),
            _number(self.memory, ".3f"),
            _number(self.of_memory, ".2f"),
            _number(self.amplification, ".3f"),
            _number(self.requests, "d"),
            ", ".join(map(str, self.targets)),
            self.verdict(),
        ]


HEADINGS = (
    "workload",
    "cache",
    "torch s",
    "dcp_fast s",
    "ratio",
    "ceiling s",
    "of ceiling",
    "memory s",
    "of memory",
    "read/needed",
    "reads",
    "target",
    "met",
)


def rows_of(measurement: Measurement) -> list[Row]:
    """The row of a measurement; and one for ``read_data`` alone where that has a target of its own."""
    workload = measurement.workload
    targets = workload.targets[measurement.temperature]
    report = measurement.report()
    ceiling = measurement.lowest_ceiling()
    copied = report.get("bytes_to_device")
    common: dict[str, Any] = {
        "cache": measurement.temperature.value,
        "amplification": report.get("read_amplification"),
        "requests": report.get("requests"),
        "records": report.get("records"),
        "metadata_reads": report.get("metadata_reads"),
        "copied": copied / workload.bytes_needed() if copied is not None else None,
        "gigabytes": workload.bytes_needed() / 1e9,
    }
    rows = [
        Row(
            label=workload.name,
            torch=measurement.median("torch"),
            dcp_fast=measurement.median("dcp_fast"),
            ceiling_name=ceiling,
            ceiling=measurement.median(ceiling) if ceiling else None,
            memory=measurement.median(memory.NAME),
            targets=tuple(target for target in targets if target.metric is not Metric.READ_DATA_SPEEDUP),
            **common,
        )
    ]
    if alone := tuple(target for target in targets if target.metric is Metric.READ_DATA_SPEEDUP):
        rows.append(
            Row(
                label=f"{workload.name} (read_data)",
                torch=measurement.read_data_median("torch"),
                dcp_fast=measurement.read_data_median("dcp_fast"),
                ceiling_name=None,
                ceiling=None,
                memory=None,
                targets=alone,
                **common,
            )
        )
    return rows


def load_table(rows: Sequence[Row]) -> str:
    return table(HEADINGS, [row.cells() for row in rows])


def peer_table(measurements: Sequence[Measurement]) -> str | None:
    lines = []
    for measurement in measurements:
        ours = measurement.median("dcp_fast")
        for name in (*PEERS, LOAD_FILE, TORCH_THREADS):
            if (median := measurement.median(name)) is None:
                if name in measurement.absent:
                    lines.append([measurement.workload.name, name, measurement.absent[name], NONE, NONE])
                continue
            speed = measurement.workload.bytes_needed() / 1e9 / median
            ratio = median / ours if ours else None
            lines.append([measurement.workload.name, name, f"{median:.3f}", f"{speed:.1f}", _number(ratio, ".1f", "x")])
    return table(("workload", "peer", "s", "GB/s", "dcp_fast is faster by"), lines) if lines else None


def gpu_table(measurements: Sequence[Measurement]) -> str:
    """What dcp_fast's last load copied and waited for, and the ceilings of both halves of its way."""
    lines = []
    for measurement in measurements:
        report = measurement.report()
        copied, waits = report.get("bytes_to_device"), report.get("wait_seconds") or {}
        gigabytes = measurement.workload.bytes_needed() / 1e9
        limits = measurement.median(PINNED_READ) or measurement.median(disk.NAME), measurement.median(PINNED_COPY)
        lines.append(
            [
                measurement.workload.name,
                measurement.temperature.value,
                *(_number(seconds, ".3f") for seconds in limits),
                *(_number(gigabytes / seconds if seconds else None, ".1f") for seconds in limits),
                _number(copied / MIB if copied is not None else None, ".0f"),
                _number(copied / measurement.workload.bytes_needed() if copied is not None else None, ".3f"),
                _number(report.get("device_copies"), "d"),
                _number(report.get("launches"), "d"),
                _number(report.get("overlap_efficiency"), ".2f"),
                *(_number(waits.get(stage), ".3f") for stage in ("disk", "slot", "device")),
            ]
        )
    headings = (
        "to GPUs",
        "cache",
        "read s",
        "copy s",
        "read GB/s",
        "copy GB/s",
        "MiB copied",
        "copied/needed",
        "copies",
        "launches",
        "overlap",
        "disk wait s",
        "slot wait s",
        "device wait s",
    )
    return table(headings, lines)


def fresh_table(fresh: Sequence[FirstLoads]) -> str:
    """First loads, held against the same speedup as later ones and against the memory that staging allows."""
    lines = []
    for first in fresh:
        theirs, ours, peak = first.seconds("torch"), first.seconds("dcp_fast"), first.private_peak_bytes("dcp_fast")
        ratio = theirs / ours if theirs and ours else None
        allowed = first.allowed_bytes()
        targets = [t for t in first.workload.targets[Temperature.WARM] if t.metric is Metric.SPEEDUP]
        words = [_word(ratio is not None and t.metric.holds(ratio, t.bound), ratio) for t in targets]
        words.append(_word(peak is not None and allowed is not None and peak <= allowed, peak))
        bounds = [*map(str, targets), f"<={allowed // MIB} MiB" if allowed is not None else NONE]
        if first.smallest_world is not None:
            growth = first.growth_bytes()
            bounds.append(f"grows <={ALLOWED_GROWTH // MIB} MiB")
            words.append(_word(growth is not None and growth <= ALLOWED_GROWTH, growth))
        peaks = [
            of(name) for of in (first.private_peak_bytes, first.mapped_peak_bytes) for name in ("torch", "dcp_fast")
        ]
        lines.append(
            [
                first.workload.name,
                _number(theirs, ".3f"),
                _number(ours, ".3f"),
                _number(ratio, ".1f", "x"),
                *(_number(found / MIB if found is not None else None, ".0f") for found in peaks),
                ", ".join(bounds),
                ", ".join(words),
            ]
        )
    private, mapped = (tuple(f"{name} {kind} MiB" for name in ("torch", "dcp_fast")) for kind in ("private", "mapped"))
    headings = ("first load", "torch s", "dcp_fast s", "ratio", *private, *mapped, "target", "met")
    return table(headings, lines)


def gpu_memory_table(fresh: Sequence[FirstLoads]) -> str:
    """GPU memory of first loads above the destinations, held against the staging that is allowed there."""
    lines = []
    for first in fresh:
        peaks = first.gpu_peak_bytes("torch"), first.gpu_peak_bytes("dcp_fast")
        ours, allowed = peaks[1], first.allowed_gpu_bytes()
        lines.append(
            [
                first.workload.name,
                *(_number(peak / MIB if peak is not None else None, ".0f") for peak in peaks),
                f"<={allowed // MIB} MiB" if allowed is not None else NONE,
                _word(ours is not None and allowed is not None and ours <= allowed, ours),
            ]
        )
    return table(("GPU memory", "torch MiB", "dcp_fast MiB", "target", "met"), lines)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (headings, rule, *lines)
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _word(met: bool, value: float | None) -> str:
    return NONE if value is None else "yes" if met else "NO"
