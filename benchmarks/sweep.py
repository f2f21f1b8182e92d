"""Which threads, block size and ring size load to a GPU fastest: every point of a grid, on one workload, warm.

Defaults are chosen from this. The first point is the defaults of today. Others come in a shuffled order that is always
the same, so that what a slow spell of the machine or the end of the budget hits is spread over the grid.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, contenders, destinations, gpu_ceilings, gpus, page_cache
from benchmarks.budget import Budget
from benchmarks.contenders import Contender, Sample
from benchmarks.record import write_json
from benchmarks.results import table
from benchmarks.verify import Expected
from benchmarks.workloads import MIB, Workload

THREADS = (4, 8, 12, 16)
BLOCKS = tuple(size * MIB for size in (1, 2, 4, 8))
RINGS = tuple(size * MIB for size in (16, 32, 64, 128))
ROUNDS = 3
NAME = "gpu_sweep"
# As many lines of the table of the best.
SHOWN = 12


@dataclass(frozen=True)
class Point:
    """Options of the reader. The memory on the device is twice the ring, as in the defaults; ``same`` needs none."""

    threads: int
    block_bytes: int
    pinned_bytes: int

    def options(self) -> dict[str, int]:
        return {**asdict(self), "device_staging_bytes": 2 * self.pinned_bytes}


@dataclass(frozen=True)
class Timed:
    """The loads of one point; None stands for the defaults."""

    point: Point | None
    # The load that pins the ring.
    first: Sample
    samples: list[Sample]

    @property
    def seconds(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def report(self) -> dict[str, Any]:
        return self.samples[-1].report


@dataclass
class Sweep:
    """All that was found so far."""

    parameters: dict[str, Any]
    gigabytes: float
    # Of each ceiling: its setting, and how long that took.
    ceilings: dict[str, tuple[str, float]]
    timed: list[Timed]
    failed: list[str]
    left_out: int

    def limit(self) -> float:
        return max(seconds for _, seconds in self.ceilings.values())

    def best_first(self) -> list[Timed]:
        return sorted(self.timed, key=lambda timed: timed.seconds)

    def grid(self) -> list[dict[str, Any]]:
        """GB/s by threads, a line for each block and ring."""
        speeds = {timed.point: round(self.gigabytes / timed.seconds, 2) for timed in self.timed}
        return [
            {
                "block_mib": block // MIB,
                "ring_mib": ring // MIB,
                "gigabytes_per_second": {threads: speeds.get(Point(threads, block, ring)) for threads in THREADS},
            }
            for block, ring in itertools.product(BLOCKS, RINGS)
        ]

    def write(self, path: Path, finished: bool) -> None:
        points = [
            {
                **({"defaults": True} if timed.point is None else timed.point.options()),
                "median_seconds": timed.seconds,
                "gigabytes_per_second": self.gigabytes / timed.seconds,
                "of_ceiling": self.limit() / timed.seconds,
                "seconds": [sample.seconds for sample in timed.samples],
                "first_seconds": timed.first.seconds,
                "report": timed.report,
            }
            for timed in self.best_first()
        ]
        ceilings = {name: {"best": best, "seconds": seconds} for name, (best, seconds) in self.ceilings.items()}
        document = {
            "parameters": self.parameters,
            "finished": finished,
            "left_out": self.left_out,
            "failed": self.failed,
            "ceilings": ceilings,
            "best_first": points,
            "grid": self.grid(),
        }
        write_json(path, document)


def run(
    workload: Workload,
    data: Path,
    out: Path,
    rounds: int | None,
    parameters: dict[str, Any],
    budget: Budget,
    say: Callable[[str], None],
) -> int:
    """Measure as many points as there is time for. Returns 1 if a load failed or was wrong."""
    import dcp_fast

    say(f"sweep of {workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, data)
    wanted = destinations.allocate(workload.checkpoint.shapes(), workload.wanted)
    page_cache.populate(checkpoints.files_of(checkpoint))
    expected = Expected(contenders.torch_contender(checkpoint, wanted.state), wanted)
    sweep = Sweep(parameters, workload.bytes_needed() / 1e9, _ceilings(workload, checkpoint, wanted, budget), [], [], 0)
    for name, (best, seconds) in sweep.ceilings.items():
        say(f"  {name}: {best}: {sweep.gigabytes / seconds:.1f} GB/s")

    points: list[Point | None] = [Point(*values) for values in itertools.product(THREADS, BLOCKS, RINGS)]
    random.Random(0).shuffle(points)
    points.insert(0, None)
    path = out / f"{NAME}.json"
    longest = 0.0
    for index, point in enumerate(points):
        if not budget.allows(longest):
            sweep.left_out = len(points) - index
            break
        begun = time.monotonic()
        # What was pinned for another setting has another size.
        dcp_fast.release_staging()
        options = point.options() if point is not None else {}
        try:
            sweep.timed.append(_time(point, options, checkpoint, wanted, expected, rounds or ROUNDS))
        except Exception as error:
            sweep.failed.append(f"{options or 'defaults'}: {type(error).__name__}: {error}")
            say(f"  FAILED: {sweep.failed[-1]}")
        longest = max(longest, time.monotonic() - begun)
        sweep.write(path, finished=False)
    dcp_fast.release_staging()
    sweep.write(path, finished=True)

    for text in _tables(sweep):
        say(f"\n{text}")
    if parameters.get("simulated"):
        say(f"\n{gpus.SIMULATED}")
    if sweep.left_out:
        say(f"\nleft out for lack of time (--seconds): {sweep.left_out} of {len(points)} points")
    say(f"\nwritten: {path}")
    return 1 if sweep.failed else 0


def _ceilings(
    workload: Workload, checkpoint: Path, wanted: destinations.Destinations, budget: Budget
) -> dict[str, tuple[str, float]]:
    tuning = budget.share(budget.left() / 4)
    reading = gpu_ceilings.pinned_read_ceiling(checkpoint, wanted, tuning)
    copying = gpu_ceilings.copy_ceiling(workload.bytes_needed(), wanted.gpus, tuning)
    return {
        ceiling.name: (str(ceiling.best), min(ceiling.tried.values()))
        for ceiling in (reading, copying)
        if ceiling is not None
    }


def _time(
    point: Point | None,
    options: dict[str, int],
    checkpoint: Path,
    wanted: destinations.Destinations,
    expected: Expected,
    rounds: int,
) -> Timed:
    """A load that pins the ring and is verified, then those that count."""

    def load() -> Sample:
        return contenders.load_with_dcp_fast(checkpoint, wanted.state, options=options)

    first = expected.run(Contender("dcp_fast", load))
    gc.collect()
    return Timed(point, first, [load() for _ in range(rounds)])


def _tables(sweep: Sweep) -> list[str]:
    ranked = sweep.best_first()
    shown = ranked[:SHOWN] + [timed for timed in ranked[SHOWN:] if timed.point is None]
    best = table(
        ("rank", "threads", "block MiB", "ring MiB", "s", "GB/s", "of ceiling", "copies", "overlap", "first s"),
        [_line(ranked.index(timed) + 1, timed, sweep) for timed in shown],
    )
    grid = table(
        ("block MiB", "ring MiB", *(f"{threads} threads" for threads in THREADS)),
        [
            [str(row["block_mib"]), str(row["ring_mib"]), *_cells(list(row["gigabytes_per_second"].values()))]
            for row in sweep.grid()
        ],
    )
    return [best, f"GB/s of every point:\n{grid}"]


def _line(rank: int, timed: Timed, sweep: Sweep) -> list[str]:
    point, report = timed.point, timed.report
    settings = ["default"] * 3
    if point is not None:
        settings = [str(point.threads), str(point.block_bytes // MIB), str(point.pinned_bytes // MIB)]
    return [
        str(rank),
        *settings,
        f"{timed.seconds:.4f}",
        f"{sweep.gigabytes / timed.seconds:.1f}",
        f"{sweep.limit() / timed.seconds:.2f}",
        str(report["device_copies"]),
        f"{report['overlap_efficiency']:.2f}",
        f"{timed.first.seconds:.3f}",
    ]


def _cells(speeds: Sequence[float | None]) -> list[str]:
    return ["-" if speed is None else f"{speed:.1f}" for speed in speeds]
