"""Runs one workload at one temperature: verify contenders against torch, tune the ceilings, time interleaved rounds."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    ceilings,
    checkpoints,
    contenders,
    destinations,
    disk,
    gpu_ceilings,
    huggingface,
    memory,
    page_cache,
    peers,
)
from benchmarks.budget import Budget
from benchmarks.contenders import Contender, Sample
from benchmarks.verify import Expected
from benchmarks.workloads import Place, Temperature, Workload

Say = Callable[[str], None]
# More than stray pages left in the cache means that the file system ignores the request to drop them.
COLD_ENOUGH = 0.05
# The part of what time is left that may go into looking for the best settings of the ceilings.
TUNING = 0.25
TORCH_THREADS = "torch, 4 threads"


@dataclass
class Measurement:
    """All timings of one workload at one temperature."""

    workload: Workload
    temperature: Temperature
    samples: dict[str, list[Sample]]
    ceilings: list[ceilings.Ceiling] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Peers that were not measured, and why.
    absent: dict[str, str] = field(default_factory=dict)

    def lowest_ceiling(self) -> str | None:
        """The slowest of the ceilings: a load whose stages overlap perfectly takes as long as that.

        What the memory allows is left out. It is no stage, but another way of the same bytes.
        """
        stages = (c.name for c in self.ceilings if c.name != memory.NAME)
        return max(stages, key=lambda name: self.median(name) or 0.0, default=None)

    def median(self, contender: str) -> float | None:
        samples = self.samples.get(contender)
        return statistics.median(sample.seconds for sample in samples) if samples else None

    def read_data_median(self, contender: str) -> float | None:
        samples = self.samples.get(contender)
        return statistics.median(sample.read_data_seconds or 0.0 for sample in samples) if samples else None

    def report(self) -> dict[str, Any]:
        """What dcp_fast reported of its last load; the counts in it are the same in every round."""
        samples = self.samples.get("dcp_fast")
        return samples[-1].report if samples else {}


@dataclass(frozen=True)
class Options:
    data: Path
    rounds: int | None
    with_dcp_fast: bool
    peers: list[str]


def run(workload: Workload, temperature: Temperature, options: Options, budget: Budget, say: Say) -> Measurement:
    """Within the budget there may be fewer rounds and settings; one round there is in any case."""
    say(f"{workload.name}, {temperature.value}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data)
    paths = checkpoints.files_of(checkpoint)
    wanted = destinations.allocate(workload.checkpoint.shapes(), workload.wanted)
    is_huggingface = workload.checkpoint.kind == huggingface.KIND
    if is_huggingface and (reason := huggingface.why_missing()) is not None:
        raise RuntimeError(f"torch's reader needs safetensors: {reason}")
    torchs_reader = huggingface.reader_of_torch if is_huggingface else None
    oracle = contenders.torch_contender(checkpoint, wanted.state, workload.hooks, torchs_reader)
    entrants = [oracle]

    # All that is verified is warmed up by it as well.
    page_cache.populate(paths)
    expected = Expected(oracle, wanted)
    if options.with_dcp_fast:
        ours = contenders.dcp_fast_contender(checkpoint, wanted.state, workload.hooks)
        expected.run(ours)
        entrants.append(ours)

    if is_huggingface:
        others = [contenders.Contender(TORCH_THREADS, partial(_load_by_threads, checkpoint, wanted.state))]
        if workload.wanted.ranks == 1:
            others.append(huggingface.load_file_contender(checkpoint, wanted.local))
        for other in others:
            expected.run(other)
        entrants += others

    # Peers and the limit of the memory are a matter of the warm load; a cold one is held against the disk.
    notes: list[str] = []
    absent: dict[str, str] = {}
    tuning = budget.share(budget.left() * TUNING)
    if temperature is Temperature.WARM:
        if workload.peers:
            entrants += _verified_peers(workload, checkpoint, options, expected, wanted, absent)
        page_cache.populate(paths)
        found = [
            _pread_ceiling(workload, checkpoint, wanted, expected, tuning),
            _memory_ceiling(workload, checkpoint, wanted, expected, options.data, notes, tuning),
        ]
    else:
        found = [_disk_ceiling(paths, notes, tuning)]
    limits = [ceiling for ceiling in found if ceiling is not None]
    if wanted.gpus:
        limits.append(gpu_ceilings.copy_ceiling(workload.bytes_needed(), wanted.gpus, tuning))
    entrants += [limit.contender for limit in limits]

    # On GPUs every single load is verified: mistakes in the order of asynchronous work show only sometimes.
    check = expected if wanted.gpus else None
    rounds = options.rounds or workload.rounds
    samples = interleave(entrants, temperature, paths, rounds, check, budget)
    measurement = Measurement(workload, temperature, samples, [*limits], notes, absent)
    if (done := len(samples[oracle.name])) < rounds:
        notes.append(f"no time for more than {done} of {rounds} rounds")
    for limit in limits:
        say(f"  {limit}: {workload.bytes_needed() / 1e9 / (measurement.median(limit.name) or math.inf):.1f} GB/s")
    for line in [*notes, *(f"{name} left out: {reason}" for name, reason in absent.items())]:
        say(f"  {line}")
    times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
    say(f"  {', '.join(times)}")
    return measurement


def _load_by_threads(checkpoint: Path, state: dict[str, Any]) -> Sample:
    return contenders.load_with_torch(checkpoint, state, make_reader=partial(huggingface.reader_of_torch, threads=4))


def _pread_ceiling(
    workload: Workload, checkpoint: Path, wanted: destinations.Destinations, expected: Expected, budget: Budget
) -> ceilings.TunedCeiling | None:
    # Finding the payloads of tens of thousands of records takes longer than is worth it, and for records of a few
    # kilobytes a read of each is no ceiling: a loader that joins neighbours is faster.
    if workload.checkpoint.kind == "small":
        return None
    if wanted.gpus:
        return gpu_ceilings.pinned_read_ceiling(checkpoint, wanted, budget)
    ceiling = ceilings.pread_ceiling(checkpoint, wanted, budget)
    if ceiling is not None:
        expected.run(ceiling.contender)
    return ceiling


def _memory_ceiling(
    workload: Workload,
    checkpoint: Path,
    wanted: destinations.Destinations,
    expected: Expected,
    folder: Path,
    notes: list[str],
    budget: Budget,
) -> ceilings.TunedCeiling | None:
    """None for small records, as above, and for destinations on GPUs, where no thread of the host can write."""
    if workload.checkpoint.kind == "small" or wanted.gpus:
        return None
    try:
        ceiling = memory.memory_ceiling(checkpoint, wanted, folder, budget)
    except memory.MissingError as error:
        notes.append(f"no limit of the memory: {error}")
        return None
    expected.run(ceiling.contender)
    return ceiling


def _disk_ceiling(paths: list[Path], notes: list[str], budget: Budget) -> ceilings.TunedCeiling:
    page_cache.evict(paths)
    left = page_cache.cached_fraction(paths)
    if left is not None and left > COLD_ENOUGH:
        notes.append(f"not cold: {left:.0%} of the pages stay cached")
    return disk.disk_ceiling(paths, lambda: page_cache.evict(paths), budget)


def _verified_peers(
    workload: Workload,
    checkpoint: Path,
    options: Options,
    expected: Expected,
    wanted: destinations.Destinations,
    absent: dict[str, str],
) -> list[Contender]:
    """Peers that load what torch loads. One that does not is left out: it is not what is tested here."""
    names = peers.names_for(Place.GPU if wanted.gpus else Place.HOST)
    absent |= {name: "not installed" for name in names if name not in options.peers}
    if not options.peers:
        return []
    if workload.checkpoint.kind == huggingface.KIND:
        paths = sorted(checkpoint.glob("*.safetensors"))
    else:
        paths = [options.data / f"{workload.checkpoint.directory_name()}.safetensors"]
        if not paths[0].exists():
            peers.write_safetensors(paths[0], wanted.local)
    page_cache.populate(paths)
    verified = []
    for name in options.peers:
        candidate = peers.peer(name, paths, wanted)
        try:
            candidate.verify(expected)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"
        else:
            verified.append(candidate.contender)
    return verified


def interleave(
    entrants: list[Contender],
    temperature: Temperature,
    paths: list[Path],
    rounds: int,
    check: Expected | None,
    budget: Budget,
) -> dict[str, list[Sample]]:
    """Time all contenders in every round, so that the machine's slow and fast spells hit them alike.

    With a check every load into the destinations is verified as well.
    """
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in entrants}
    longest = 0.0
    for index in range(rounds):
        if not budget.allows(longest) and index > 0:
            break
        begun = time.monotonic()
        if temperature is Temperature.WARM:
            page_cache.populate(paths)
        # Each round begins with another contender, so that none always follows the same one.
        start = index % len(entrants)
        for contender in entrants[start:] + entrants[:start]:
            if temperature is Temperature.COLD:
                page_cache.evict(paths)
            gc.collect()
            sample = check.run(contender) if check is not None and contender.fills_destinations else contender.run()
            samples[contender.name].append(sample)
        longest = max(longest, time.monotonic() - begun)
    return samples
