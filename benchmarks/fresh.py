"""The first load of a process: how long it takes, and its peaks of host and GPU memory above the destinations.

This is what a job that resumes sees. In a process that has loaded before, torch's temporary tensors land in memory
that was touched then, which makes later loads a good deal faster than the first.

    python -m benchmarks.fresh CHECKPOINT PLACE WORKLOAD SCALE CONTENDER

is one such process; it prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks import checkpoints, contenders, destinations, gpus, huggingface, page_cache, prelude, resident
from benchmarks.budget import Budget
from benchmarks.workloads import MIB, Place, Temperature, Workload, workloads_of

ALLOWED_BEYOND_STAGING = 32 * MIB
# What a rank's peak may differ by between worlds and still count as constant.
ALLOWED_GROWTH = 4 * MIB
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class FirstLoad:
    """One load that was the only one of its process."""

    contender: str
    seconds: float
    # All that was resident at once, then the private part of it, and the pages of mapped files, each at its own peak.
    peak_bytes: int
    private_peak_bytes: int
    mapped_peak_bytes: int
    # Where the kernel cannot reset the high-water mark, an earlier peak may show instead of the load's.
    peak_is_exact: bool
    # The memory that the contender may use by its own settings.
    staging_bytes: int | None
    # Of the GPU that needed most. Neither loader gives memory back to the driver before its load ends.
    gpu_peak_bytes: int | None = None
    gpu_staging_bytes: int | None = None
    # Where several ranks loaded: `seconds` and `peak_bytes` are the largest of them all.
    rank_peak_bytes: list[int] | None = None


@dataclass(frozen=True)
class FirstLoads:
    """All first loads of one workload."""

    workload: Workload
    loads: list[FirstLoad]
    # The same by the fewest ranks; no rank's peak may be larger than there.
    smallest_world: FirstLoads | None = None

    def seconds(self, contender: str) -> float | None:
        found = [load.seconds for load in self.loads if load.contender == contender]
        return statistics.median(found) if found else None

    def private_peak_bytes(self, contender: str) -> int | None:
        return max((load.private_peak_bytes for load in self.loads if load.contender == contender), default=None)

    def mapped_peak_bytes(self, contender: str) -> int | None:
        return max((load.mapped_peak_bytes for load in self.loads if load.contender == contender), default=None)

    def gpu_peak_bytes(self, contender: str) -> int | None:
        peaks = [load.gpu_peak_bytes for load in self.loads if load.contender == contender]
        return max((peak for peak in peaks if peak is not None), default=None)

    def allowed_bytes(self) -> int | None:
        staging = [load.staging_bytes for load in self.loads if load.staging_bytes is not None]
        return staging[0] + ALLOWED_BEYOND_STAGING if staging else None

    def allowed_gpu_bytes(self) -> int | None:
        staging = [load.gpu_staging_bytes for load in self.loads if load.gpu_staging_bytes is not None]
        return staging[0] + ALLOWED_BEYOND_STAGING if staging else None

    def growth_bytes(self) -> int | None:
        """How much larger dcp_fast's private memory is than in the smallest world."""
        peak = self.private_peak_bytes("dcp_fast")
        least = self.smallest_world.private_peak_bytes("dcp_fast") if self.smallest_world is not None else None
        return peak - least if peak is not None and least is not None else None


def measure(
    workload: Workload, data: Path, entrants: list[str], rounds: int, budget: Budget, say: Callable[[str], None]
) -> list[FirstLoads]:
    """Run every contender in processes of its own, in turn. Within the budget there may be fewer rounds than asked for.

    Raises:
        subprocess.SubprocessError: a process failed, or took all the time that was left.
    """
    say(f"{workload.name}, first load of a process: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, data)
    loads: list[FirstLoad] = []
    longest = 0.0
    for index in range(rounds):
        if not budget.allows(longest) and index > 0:
            say(f"  no time for more than {index} of {rounds} rounds")
            break
        begun = time.monotonic()
        page_cache.populate(checkpoints.files_of(checkpoint))
        for contender in entrants:
            place = Place.HOST if workload.wanted.devices == ("cpu",) else Place.GPU
            arguments = [
                str(checkpoint.resolve()),
                place.value,
                workload.name,
                str(workload.checkpoint.scale),
                contender,
            ]
            command = [sys.executable, "-m", "benchmarks.fresh", *arguments]
            # Standard error is left alone: when the process fails, its traceback is what one needs to see.
            done = subprocess.run(
                command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True, timeout=budget.timeout()
            )
            loads.append(FirstLoad(**json.loads(done.stdout)))
        longest = max(longest, time.monotonic() - begun)
    result = FirstLoads(workload, loads)
    found = (f"{name} {result.seconds(name):.3f} s" for name in entrants)
    say(f"  {Temperature.WARM.value}: {', '.join(found)}")
    return [result]


def _load_here(checkpoint: Path, workload: Workload, contender: str) -> FirstLoad:
    wanted = destinations.allocate(workload.checkpoint.shapes(), workload.wanted)
    staging_bytes = gpu_staging_bytes = None
    if contender == "dcp_fast":
        import dcp_fast

        is_huggingface = workload.checkpoint.kind == huggingface.KIND
        reader = (dcp_fast.HuggingFaceStorageReader if is_huggingface else dcp_fast.FileSystemReader)(checkpoint)
        staging_bytes = reader.staging_bytes
        if wanted.gpus:
            staging_bytes += reader.staging_limits().pinned_bytes
            gpu_staging_bytes = reader.device_staging_bytes
    load = contenders.load_with_dcp_fast
    if contender == "torch":
        load = partial(contenders.load_with_torch, make_reader=huggingface.reader_of_torch)
    gpu_before = gpus.used_bytes(wanted.gpus)
    with resident.watched() as peaks:
        sample = load(checkpoint, wanted.state)
    gpu_after = gpus.used_bytes(wanted.gpus)
    gpu_peak = max((gpu_after[device] - gpu_before[device] for device in gpu_before), default=None)
    return FirstLoad(
        contender,
        sample.seconds,
        peaks.all_bytes,
        peaks.private_bytes,
        peaks.mapped_bytes,
        peaks.is_exact,
        staging_bytes,
        gpu_peak,
        gpu_staging_bytes,
    )


if __name__ == "__main__":
    prelude.run()
    _checkpoint, _place, _workload, _scale, _contender = sys.argv[1:]
    _known = workloads_of(Place(_place), float(_scale), gpus.names())
    _result = _load_here(Path(_checkpoint), _known[_workload], _contender)
    print(json.dumps(asdict(_result)))
