"""Runs one workload: allocate, verify every contender against torch, tune the ceilings, time interleaved rounds."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ceilings, checkpoints, contenders, destinations, gpu_ceilings, page_cache, peers
from benchmarks.contenders import Contender, Sample
from benchmarks.workloads import Temperature, Workload

Say = Callable[[str], None]
# More than stray pages left in the cache means that the file system ignores the request to drop them.
COLD_ENOUGH = 0.05


class VerificationError(Exception):
    """A contender loaded something else than torch did."""


@dataclass
class Measurement:
    """All timings of one workload at one temperature."""

    workload: Workload
    temperature: Temperature
    samples: dict[str, list[Sample]]
    ceilings: list[ceilings.Ceiling] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lowest_ceiling(self) -> str | None:
        """The slowest of the ceilings: a load whose stages overlap perfectly takes as long as that."""
        return max((c.name for c in self.ceilings), key=lambda name: self.median(name) or 0.0, default=None)

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


def run(workload: Workload, options: Options, say: Say) -> list[Measurement]:
    say(f"{workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data)
    paths = checkpoints.files_of(checkpoint)
    wanted = destinations.allocate(workload.checkpoint.shapes(), workload.wanted)
    loaders = [contenders.torch_contender(checkpoint, wanted.state)]
    if options.with_dcp_fast:
        loaders.append(contenders.dcp_fast_contender(checkpoint, wanted.state))
    rivals = _peer_contenders(workload, options, checkpoint, wanted) if workload.peers else []

    page_cache.populate(paths)
    expected = _verify(loaders + rivals, wanted)

    measurements = []
    for temperature in workload.targets:
        # Peers and the limit of the memory are a matter of the warm load; a cold one is held against the disk.
        warm = temperature is Temperature.WARM
        notes = []
        limits = []
        if warm:
            page_cache.populate(paths)
            reading = _pread_ceiling(workload, checkpoint, wanted, expected)
        else:
            page_cache.evict(paths)
            left = page_cache.cached_fraction(paths)
            if left is not None and left > COLD_ENOUGH:
                notes.append(f"not cold: {left:.0%} of the pages stay cached")
            reading = ceilings.direct_ceiling(paths, lambda: page_cache.evict(paths))
            if reading is None:
                notes.append("no ceiling: the file system refuses O_DIRECT")
        if reading is not None:
            limits.append(reading)
        if wanted.gpus:
            limits.append(gpu_ceilings.copy_ceiling(workload.bytes_needed(), wanted.gpus))
        for limit in limits:
            say(f"  {temperature.value} ceiling {limit}")
        entrants = loaders + (rivals if warm else []) + [limit.contender for limit in limits]
        check = Check(wanted, expected) if wanted.gpus else None
        samples = _interleave(entrants, temperature, paths, options.rounds or workload.rounds, check)
        measurement = Measurement(workload, temperature, samples, [*limits], notes)
        measurements.append(measurement)
        for line in notes:
            say(f"  {line}")
        times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
        say(f"  {temperature.value}: {', '.join(times)}")
    return measurements


def _pread_ceiling(
    workload: Workload, checkpoint: Path, wanted: destinations.Destinations, expected: dict[str, str]
) -> ceilings.TunedCeiling | None:
    # Finding the payloads of tens of thousands of records takes longer than is worth it, and for records of a few
    # kilobytes a read of each is no ceiling: a loader that joins neighbours is faster.
    if workload.checkpoint.kind == "small":
        return None
    if wanted.gpus:
        return gpu_ceilings.pinned_read_ceiling(checkpoint, wanted)
    ceiling = ceilings.pread_ceiling(checkpoint, wanted)
    if ceiling is not None:
        Check(wanted, expected).run(ceiling.contender)
    return ceiling


def _peer_contenders(
    workload: Workload, options: Options, checkpoint: Path, wanted: destinations.Destinations
) -> list[Contender]:
    if not options.peers:
        return []
    path = options.data / f"{workload.checkpoint.directory_name()}.safetensors"
    if not path.exists():
        contenders.load_with_torch(checkpoint, wanted.state)
        peers.write_safetensors(path, wanted.local)
    page_cache.populate([path])
    return [peers.peer_contender(name, path, wanted.local) for name in options.peers]


def _verify(entrants: list[Contender], wanted: destinations.Destinations) -> dict[str, str]:
    """Hold what every contender loads against what the first one, torch, does. It warms all of them up as well.

    Returns the hash of every tensor as torch loads it.
    """
    oracle, *others = entrants
    wanted.poison()
    oracle.run()
    expected = wanted.digests()
    for contender in others:
        Check(wanted, expected).run(contender)
    return expected


@dataclass(frozen=True)
class Check:
    """Runs a contender on overwritten tensors, and holds what it loads against what is expected."""

    wanted: destinations.Destinations
    expected: dict[str, str]

    def run(self, contender: Contender) -> Sample:
        self.wanted.poison()
        sample = contender.run()
        loaded = self.wanted.digests()
        if differing := [name for name, digest in self.expected.items() if loaded[name] != digest]:
            raise VerificationError(
                f"{contender.name} loads {len(differing)} tensors differently, first: {differing[0]}"
            )
        return sample


def _interleave(
    entrants: list[Contender], temperature: Temperature, paths: list[Path], rounds: int, check: Check | None
) -> dict[str, list[Sample]]:
    """Time all contenders in every round, so that the machine's slow and fast spells hit them alike.

    With a check every single load is verified as well: mistakes in the order of asynchronous work show only sometimes.
    """
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in entrants}
    for index in range(rounds):
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
    return samples
