"""The order in which things are measured. Results are written after every step, and steps may be left out for time."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import checkpoints, metadata, node, sharing
from benchmarks.workloads import Temperature, Workload

# Of one round of first loads, by each of both loaders in a process of its own.
_FIRST_LOADS_SECONDS = 25
# What matters most comes first. The seconds are what each is expected to take at scale 1 on a machine with 16 cores and
# one GPU. None: first loads.
_GPU_STEPS: tuple[tuple[str, Temperature | None, float], ...] = (
    ("same", Temperature.WARM, 20),
    ("rows8", Temperature.WARM, 10),
    ("whole8", Temperature.WARM, 15),
    ("convert", Temperature.WARM, 15),
    ("hf", Temperature.WARM, 15),
    ("hf_fp8", Temperature.WARM, 30),
    ("hf_mxfp4", Temperature.WARM, 15),
    ("cols8", Temperature.WARM, 15),
    ("same", Temperature.COLD, 30),
    ("same", None, _FIRST_LOADS_SECONDS),
    ("spread", Temperature.WARM, 15),
    ("rows8_to_cols2", Temperature.WARM, 15),
    ("small", Temperature.WARM, 30),
)
# To write a checkpoint that is not there yet.
_WRITING_SECONDS = 15
# A step that takes longer than was expected gets so many times as long, before it has to do with fewer rounds.
PATIENCE = 2.0
# To start processes takes as long for the smallest data.
_LEAST_SCALE = 0.4


class Kind(enum.Enum):
    LOADS = "loads"
    FIRST_LOADS = "first loads"
    METADATA = "metadata"
    NODE = "ranks of one machine"
    SHARING = "ranks that share reads"


@dataclass(frozen=True)
class Step:
    """What is measured in one go."""

    kind: Kind
    workload: Workload | None = None
    temperature: Temperature | None = None
    # Of first loads.
    rounds: int = 0
    # What it takes, roughly, and with its checkpoint to be written. A step is left out where there is less time.
    seconds: float = 0.0
    writing_seconds: float = 0.0

    def __str__(self) -> str:
        if self.workload is None:
            return self.kind.value
        what = self.kind.value if self.temperature is None else self.temperature.value
        return f"{self.workload.name} ({what})"


def expected_seconds(step: Step, data: Path) -> float:
    """What a step will take, given what the data directory has already."""
    there = step.workload is None or checkpoints.is_there(step.workload.checkpoint, data)
    return step.seconds + (0.0 if there else step.writing_seconds)


def on_host(known: Mapping[str, Workload], chosen: Collection[str], fresh_rounds: int | None) -> list[Step]:
    """Everything about one workload before the next, in the order in which they were asked for."""
    steps: list[Step] = []
    for name in chosen:
        if name == metadata.NAME:
            steps.append(Step(Kind.METADATA))
            continue
        if name == node.NAME:
            steps.append(Step(Kind.NODE))
            continue
        if name == sharing.NAME:
            steps.append(Step(Kind.SHARING))
            continue
        workload = known[name]
        steps += [Step(Kind.LOADS, workload, temperature) for temperature in workload.targets]
        rounds = workload.fresh_rounds if fresh_rounds is None else fresh_rounds
        if workload.fresh_rounds and rounds:
            steps.append(Step(Kind.FIRST_LOADS, workload, rounds=rounds))
    return steps


def on_gpus(
    known: Mapping[str, Workload], chosen: Collection[str], fresh_rounds: int | None, scale: float
) -> list[Step]:
    """What matters most comes first. First loads are one round of ``same``, unless a number of rounds is asked for."""
    scale = max(scale, _LEAST_SCALE)
    writing = _WRITING_SECONDS * scale
    steps: list[Step] = []
    for name, temperature, seconds in _GPU_STEPS:
        if name not in chosen or name not in known:
            continue
        if temperature is not None:
            step = Step(Kind.LOADS, known[name], temperature, seconds=seconds * scale, writing_seconds=writing)
            steps.append(step)
        elif fresh_rounds is None:
            steps.append(_first_loads(known[name], 1, scale))
    if fresh_rounds:
        steps += [_first_loads(known[name], fresh_rounds, scale) for name in chosen if known[name].fresh_rounds]
    return steps


def _first_loads(workload: Workload, rounds: int, scale: float) -> Step:
    seconds, writing = rounds * _FIRST_LOADS_SECONDS * scale, _WRITING_SECONDS * scale
    return Step(Kind.FIRST_LOADS, workload, rounds=rounds, seconds=seconds, writing_seconds=writing)
