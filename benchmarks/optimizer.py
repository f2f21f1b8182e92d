"""Runs the optimizer workload: Adam state that 4 ranks saved, loaded by 2 with load_sharded_optimizer_state_dict.

Unlike in the other workloads the ranks are real, since the function works with a process group only. What it yields
is the same: a measurement for the table, and first loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import checkpoints, memory, page_cache
from benchmarks.ceilings import Ceiling, Setting
from benchmarks.contenders import Sample
from benchmarks.fresh import FirstLoad, FirstLoads
from benchmarks.measure import Measurement, Options, Say
from benchmarks.optimizer_limits import PREAD, pread_setting
from benchmarks.optimizer_ranks import RankLoad, Task, run_ranks
from benchmarks.verify import VerificationError
from benchmarks.workloads import Temperature, Workload

# First loads are done in each of these, smallest first: a rank's peak must not grow with the world.
WORLD_SIZES = (1, 2, 4)


def run(workload: Workload, options: Options, say: Say) -> Measurement:
    """Verify that both loaders yield the same, and time them in interleaved rounds, in rank processes that stay."""
    say(f"{workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data).resolve()
    entrants = ("torch", "dcp_fast") if options.with_dcp_fast else ("torch",)
    notes: list[str] = []
    folder: Path | None = options.data.resolve()
    try:
        memory.library(options.data)
    except memory.MissingError as error:
        folder = None
        notes.append(f"no limit of the memory: {error}")
    rounds_wanted = options.rounds or workload.rounds
    task = Task("verify_and_time", checkpoint, workload.checkpoint, entrants, rounds_wanted, folder)
    ranks = run_ranks(task, workload.wanted.ranks)
    for number, rank in enumerate(ranks):
        for name, differing in rank["differing"].items():
            if differing:
                raise VerificationError(
                    f"{name} loads {len(differing)} entries differently on rank {number}, first: {differing[0]}"
                )

    samples = {}
    for name in ranks[0]["samples"]:
        rounds: list[tuple[RankLoad, ...]] = list(zip(*(rank["samples"][name] for rank in ranks), strict=True))
        samples[name] = [_sample(loads) for loads in rounds]
    reads = (f"{name} {samples[name][-1].report['metadata_reads']}" for name in entrants)
    # Unlike the time, this hardly depends on what else the machine does.
    cpu = (f"{name} {median(s.report['cpu_seconds'] for s in samples[name]):.3f} s" for name in samples)
    notes += [
        f"metadata reads of a rank's call: {', '.join(reads)}",
        f"processor time of a rank's call: {', '.join(cpu)}",
    ]
    limits = [Ceiling(PREAD, pread_setting(workload.wanted.ranks), {})]
    if found := ranks[0]["memory"]:
        way, block, threads = found["best"]
        limits.append(Ceiling(memory.NAME, Setting(threads, block, way=way), found["tried"]))
    measurement = Measurement(workload, Temperature.WARM, samples, limits, notes)
    for line in notes:
        say(f"  {line}")
    times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
    say(f"  {Temperature.WARM.value}: {', '.join(times)}")
    return measurement


def first_loads(workload: Workload, data: Path, entrants: Sequence[str], rounds: int, say: Say) -> list[FirstLoads]:
    """The first load of fresh ranks, with each rank's peak, in worlds of several sizes."""
    checkpoint = checkpoints.ensure(workload.checkpoint, data).resolve()
    results: list[FirstLoads] = []
    for ranks in WORLD_SIZES:
        loads = []
        for _ in range(rounds):
            page_cache.populate(checkpoints.files_of(checkpoint))
            for name in entrants:
                task = Task("first_load", checkpoint, workload.checkpoint, (name,))
                loads.append(_first_load(name, run_ranks(task, ranks)))
        result = FirstLoads(_in_world(workload, ranks), loads, smallest_world=results[0] if results else None)
        results.append(result)
        found = (f"{name} {result.seconds(name):.3f} s" for name in entrants)
        say(f"  {Temperature.WARM.value}, first load by {ranks} rank{'s' if ranks > 1 else ''}: {', '.join(found)}")
    return results


def _in_world(workload: Workload, ranks: int) -> Workload:
    """The workload with another number of ranks. Its target on time is for calls in a warm process only."""
    return replace(
        workload,
        name=f"{workload.name}, {ranks} rank{'s' if ranks > 1 else ''}",
        wanted=replace(workload.wanted, ranks=ranks),
        targets={Temperature.WARM: ()},
    )


def _sample(loads: Sequence[RankLoad]) -> Sample:
    """A load takes as long as its slowest rank, whose report stands for it; metadata counts where it is read most."""
    slowest = max(loads, key=lambda load: float(load["seconds"]))
    report = {
        **slowest.get("report", {}),
        "metadata_reads": max(load["metadata_reads"] for load in loads),
        "cpu_seconds": max(load["cpu_seconds"] for load in loads),
        "rank_seconds": [load["seconds"] for load in loads],
    }
    return Sample(slowest["seconds"], report=report)


def _first_load(name: str, ranks: Sequence[dict[str, Any]]) -> FirstLoad:
    peaks = [rank["private_peak_bytes"] for rank in ranks]
    return FirstLoad(
        name,
        seconds=max(rank["seconds"] for rank in ranks),
        peak_bytes=max(rank["peak_bytes"] for rank in ranks),
        private_peak_bytes=max(peaks),
        mapped_peak_bytes=max(rank["mapped_peak_bytes"] for rank in ranks),
        peak_is_exact=all(rank["peak_is_exact"] for rank in ranks),
        staging_bytes=ranks[0].get("staging_bytes"),
        rank_peak_bytes=peaks,
    )
