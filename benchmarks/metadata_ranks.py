"""Metadata that several ranks of one machine need: read by each of them, or by one that sends its bytes to the others.

Each sample is that of fresh processes, which load nothing but the metadata: an empty state dict.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from benchmarks import metadata, page_cache
from benchmarks.metadata_process import die_first
from benchmarks.resident import reset_high_water_mark, status_bytes
from benchmarks.verify import VerificationError
from benchmarks.workloads import MIB

RANKS = 4  # that load; who wrote the metadata were
WRITERS = (512, 4096)


@dataclass(frozen=True)
class RankSample:
    """What one rank took. The peak is above what its process had before."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    received: bool


# Of all ranks, in their order; empty if a rank was killed.
Sample = list[RankSample]


@dataclass(frozen=True)
class Measurement:
    """All samples of the metadata that so many ranks wrote."""

    tensors: int
    writers: int
    own: list[Sample]
    shared: list[Sample]


def run(data: Path, scale: float, rounds: int | None, say: Callable[[str], None]) -> list[Measurement]:
    """Measure both ways of all sizes, in turns."""
    tensors = max(1, round(metadata.TENSORS * scale))
    measurements = []
    for writers in WRITERS:
        checkpoint = metadata.ensure(data, tensors, writers)
        measurement = Measurement(tensors, writers, [], [])
        for _ in range(rounds or metadata.ROUNDS):
            for share, samples in ((False, measurement.own), (True, measurement.shared)):
                page_cache.populate([checkpoint / ".metadata"])
                samples.append(_sample(checkpoint, share))
                if not samples[-1]:
                    say(f"  {writers} ranks, read by {RANKS}: killed, presumably for its memory")
        if any(rank.received for sample in measurement.own for rank in sample):
            raise VerificationError("metadata was shared where each rank was to read its own")
        measurements.append(measurement)
        times = (f"{name} {_number(_seconds(samples), '.3f')} s" for name, samples in _ways(measurement))
        say(f"  {writers} ranks, read by {RANKS} ranks: {', '.join(times)}")
    return measurements


def _ways(measurement: Measurement) -> list[tuple[str, list[Sample]]]:
    return [("each its own", measurement.own), ("shared", measurement.shared)]


def _sample(checkpoint: Path, share: bool) -> Sample:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            spawn(_as_rank, args=(checkpoint, share, scratch), nprocs=RANKS)  # type: ignore[no-untyped-call]
        except ProcessExitedException:
            return []
        return [RankSample(**json.loads(_found(scratch, rank).read_text())) for rank in range(RANKS)]


def _as_rank(rank: int, checkpoint: Path, share: bool, scratch: str) -> None:
    import dcp_fast

    die_first()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=RANKS)
    try:
        dist.barrier()
        reset_high_water_mark()
        before, start, start_cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
        dcp_fast.load({}, checkpoint_id=checkpoint, share_metadata=share)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        peak = status_bytes("VmHWM") - before
        report = dcp_fast.last_report()
        assert report is not None
        sample = RankSample(seconds, cpu_seconds, peak, report.metadata_received)
        _found(scratch, rank).write_text(json.dumps(asdict(sample)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _found(scratch: str, rank: int) -> Path:
    return Path(scratch) / f"rank{rank}.json"


HEADINGS = (
    f"metadata read by {RANKS} ranks",
    "way",
    "s",
    "CPU s, all ranks",
    "MiB, first rank",
    "MiB, other ranks",
)


def table_lines(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One for each size and way, under HEADINGS."""
    return [
        [
            f"written by {measurement.writers} ranks",
            name,
            _number(_seconds(samples), ".3f"),
            _number(_median(samples, lambda sample: sum(rank.cpu_seconds for rank in sample)), ".3f"),
            _number(_median(samples, lambda sample: sample[0].peak_bytes / MIB), ".0f"),
            _number(_median(samples, lambda sample: max(rank.peak_bytes for rank in sample[1:]) / MIB), ".0f"),
        ]
        for measurement in measurements
        for name, samples in _ways(measurement)
    ]


def _seconds(samples: Sequence[Sample]) -> float | None:
    return _median(samples, lambda sample: max(rank.seconds for rank in sample))


def _median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float | None:
    values = [figure(sample) for sample in samples if sample]
    return statistics.median(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "not run" if value is None else f"{value:{form}}"
