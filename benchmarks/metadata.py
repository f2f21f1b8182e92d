"""The metadata workload: reading the metadata of checkpoints that many ranks wrote, and planning one rank's load.

Unlike in the other workloads there is no payload at all, and every sample is a process of its own: a job reads metadata
once, into memory as fresh as that, and what torch makes of it would slow down whatever came next in the process.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import page_cache
from benchmarks.fresh import REPOSITORY
from benchmarks.metadata_files import add_plans, write_metadata
from benchmarks.metadata_process import LOADING_RANKS, Sample
from benchmarks.verify import VerificationError
from benchmarks.workloads import MIB

NAME = "metadata"
TITLE = f"metadata of 1,000 tensors by 64, 512 and 4,096 ranks, read, and one rank of {LOADING_RANKS} planned"
TENSORS = 1000
RANKS = (64, 512, 4096)
RANKS_WITH_PLANS = 64
ROUNDS = 3
# torch takes minutes with as many chunks, so it gets one round.
ONE_ROUND_CHUNKS = 2_000_000
# What torch takes per chunk varies a little with the size of the numbers; and planning needs memory as well.
MEMORY_MARGIN = 1.2
# Raise this when the generator writes something else, so that old files are not used.
FORMAT = 2


class Stage(enum.Enum):
    """What is timed; the value is how the table calls it."""

    READ = "read_metadata"
    PLAN = "planning"
    ITEMS = "planning, with ReadItems"  # which our own reader does not ask for

    def seconds(self, sample: Sample) -> float:
        if self is Stage.READ:
            return sample.read_seconds
        return sample.plan_seconds if self is Stage.PLAN else sample.items_seconds

    def peak_bytes(self, sample: Sample) -> int:
        return sample.read_peak_bytes if self is Stage.READ else sample.plan_peak_bytes


class Figure(enum.Enum):
    """A figure that a target bounds; the value is how a target on it reads."""

    SPEEDUP = ">={:g}x torch"
    MEMORY = "<=1/{:g} of torch's memory"
    SECONDS = "<={:g} s"
    GIGABYTES = "<={:g} GB"


TARGETS: dict[tuple[Stage, int], dict[Figure, float]] = {
    (Stage.READ, 512): {Figure.SPEEDUP: 40, Figure.MEMORY: 8},
    (Stage.READ, 4096): {Figure.SECONDS: 8, Figure.GIGABYTES: 2.5},
    (Stage.PLAN, 512): {Figure.SPEEDUP: 20},
}
TARGET_WITH_PLANS = {Figure.SPEEDUP: 40.0}  # of reading
IMPORT_SECONDS = 0.03  # the most that importing dcp_fast may take


@dataclass(frozen=True)
class Measurement:
    """All samples of the metadata that so many ranks wrote; a contender without any was not run.

    Attributes:
        with_plans: whether the file also has the plans of all ranks and a dict, as Megatron-Core's has.
    """

    tensors: int
    ranks: int
    with_plans: bool
    file_bytes: int
    samples: dict[str, list[Sample]]

    def __str__(self) -> str:
        return f"{self.ranks} ranks" + (", with plans" if self.with_plans else "")

    def targets(self, stage: Stage) -> dict[Figure, float]:
        """They are for the metadata at its full size."""
        if self.tensors != TENSORS:
            return {}
        if self.with_plans:
            return TARGET_WITH_PLANS if stage is Stage.READ else {}
        return TARGETS.get((stage, self.ranks), {})

    def seconds(self, stage: Stage, contender: str) -> float | None:
        samples = self.samples[contender]
        return statistics.median(map(stage.seconds, samples)) if samples else None

    def peak_bytes(self, stage: Stage, contender: str) -> int | None:
        return max(map(stage.peak_bytes, self.samples[contender]), default=None)

    def import_seconds(self) -> list[float]:
        return [sample.import_seconds for sample in self.samples["dcp_fast"]]

    def speedup(self, stage: Stage) -> float | None:
        return _ratio(self.seconds(stage, "torch"), self.seconds(stage, "dcp_fast"))

    def less_memory(self, stage: Stage) -> float | None:
        return _ratio(self.peak_bytes(stage, "torch"), self.peak_bytes(stage, "dcp_fast"))

    def meets(self, stage: Stage, figure: Figure, bound: float) -> bool | None:
        """None where that was not measured."""
        if figure is Figure.SPEEDUP:
            return _holds(self.speedup(stage), lambda value: value >= bound)
        if figure is Figure.MEMORY:
            return _holds(self.less_memory(stage), lambda value: value >= bound)
        if figure is Figure.SECONDS:
            return _holds(self.seconds(stage, "dcp_fast"), lambda value: value <= bound)
        return _holds(self.peak_bytes(stage, "dcp_fast"), lambda value: value / 1e9 <= bound)


def _ratio(value: float | None, to: float | None) -> float | None:
    return value / to if value is not None and to else None


def _holds(value: float | None, condition: Callable[[float], bool]) -> bool | None:
    return None if value is None else condition(value)


def run(
    data: Path, scale: float, rounds: int | None, entrants: Sequence[str], say: Callable[[str], None]
) -> list[Measurement]:
    """Measure all sizes, smallest first, and compare the plans of the entrants."""
    say(f"{NAME}: {TITLE}")
    tensors = max(1, round(TENSORS * scale))
    measurements: list[Measurement] = []
    for ranks, with_plans in [(RANKS_WITH_PLANS, True), *((ranks, False) for ranks in RANKS)]:
        checkpoint = ensure(data, tensors, ranks, with_plans)
        file = checkpoint / ".metadata"
        samples: dict[str, list[Sample]] = {name: [] for name in ("torch", "dcp_fast")}
        measurement = Measurement(tensors, ranks, with_plans, file.stat().st_size, samples)
        reason = _why_torch_cannot([m for m in measurements if not m.with_plans], ranks)
        if reason is not None:
            say(f"  {measurement}: torch not run: {reason}")
        for number in range(rounds or ROUNDS):
            for name in entrants:
                often_enough = number > 0 and tensors * ranks >= ONE_ROUND_CHUNKS
                if name == "torch" and (reason is not None or often_enough):
                    continue
                page_cache.populate([file])
                sample = _in_a_process(checkpoint, tensors, ranks, name)
                if sample is None:
                    say(f"  {measurement}: {name} was killed, presumably for its memory")
                    reason = "killed"
                    continue
                samples[name].append(sample)
        _verify(measurement)
        measurements.append(measurement)
        for stage in Stage:
            times = (f"{name} {_number(measurement.seconds(stage, name), '.3f')} s" for name in entrants)
            say(f"  {measurement}, {stage.value}: {', '.join(times)}")
    return measurements


def ensure(data: Path, tensors: int, ranks: int, with_plans: bool = False) -> Path:
    """Return the folder of the metadata, written first if this data directory does not have it."""
    directory = data / f"metadata-{tensors}x{ranks}{'-plans' if with_plans else ''}-{FORMAT}"
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / ".metadata").exists():
        unfinished = directory / "unfinished"
        with unfinished.open("wb") as file:
            write_metadata(file, tensors, ranks)
        if with_plans:
            add_plans(unfinished)
        unfinished.rename(directory / ".metadata")
    return directory


def _why_torch_cannot(smaller: Sequence[Measurement], ranks: int) -> str | None:
    """None where torch's objects will fit into memory, going by what they took for fewer ranks."""
    peaks = [(m.ranks, m.peak_bytes(Stage.READ, "torch")) for m in smaller]
    if not peaks:
        return None
    fewer, peak = peaks[-1]
    if peak is None:
        return "it did not fit with fewer ranks"
    needed = peak * ranks / fewer * MEMORY_MARGIN
    available = _available_bytes()
    if needed <= available:
        return None
    return f"it would take about {needed / 1e9:.0f} GB of memory, and {available / 1e9:.0f} GB are available"


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LookupError("/proc/meminfo has no MemAvailable")


def _in_a_process(checkpoint: Path, tensors: int, ranks: int, contender: str) -> Sample | None:
    """None where it was killed."""
    arguments = [str(checkpoint.resolve()), str(tensors), str(ranks), contender]
    # As installed packages are imported, whatever the settings of whoever measures.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(checkpoint.resolve().parent / "bytecode")
    command = [sys.executable, "-m", "benchmarks.metadata_process", *arguments]
    # Standard error is left alone: when the process fails, its traceback is what one needs to see.
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        return None
    done.check_returncode()
    return Sample(**json.loads(done.stdout))


def _verify(measurement: Measurement) -> None:
    plans = {(sample.items, sample.digest) for samples in measurement.samples.values() for sample in samples}
    if len(plans) > 1:
        raise VerificationError(f"the plans for {measurement} differ")


HEADINGS = (
    "metadata",
    "MB",
    "torch s",
    "dcp_fast s",
    "ratio",
    "torch MiB",
    "dcp_fast MiB",
    "less by",
    "target",
    "met",
)


def table_lines(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One for each stage and size, under HEADINGS; and one for the import, of all samples."""
    lines = [_line(measurement, stage) for stage in Stage for measurement in measurements]
    imports = [seconds for measurement in measurements for seconds in measurement.import_seconds()]
    if imports:
        seconds = statistics.median(imports)
        target = Figure.SECONDS.value.format(IMPORT_SECONDS)
        met = "yes" if seconds <= IMPORT_SECONDS else "NO"
        lines.append(["import dcp_fast, after torch's", "", "", f"{seconds:.3f}", "", "", "", "", target, met])
    return lines


def _line(measurement: Measurement, stage: Stage) -> list[str]:
    targets = measurement.targets(stage)
    words = [measurement.meets(stage, figure, bound) for figure, bound in targets.items()]
    peaks = [measurement.peak_bytes(stage, name) for name in ("torch", "dcp_fast")]
    return [
        f"{stage.value}, {measurement}",
        f"{measurement.file_bytes / 1e6:.0f}",
        *(_number(measurement.seconds(stage, name), ".3f") for name in ("torch", "dcp_fast")),
        _number(measurement.speedup(stage), ".1f", "x"),
        *("" if stage is Stage.ITEMS else _number(None if peak is None else peak / MIB, ".0f") for peak in peaks),
        # Planning takes next to none.
        _number(measurement.less_memory(stage), ".1f", "x") if stage is Stage.READ else "",
        ", ".join(figure.value.format(bound) for figure, bound in targets.items()),
        ", ".join("-" if word is None else "yes" if word else "NO" for word in words),
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "not run" if value is None else f"{value:{form}}{unit}"
