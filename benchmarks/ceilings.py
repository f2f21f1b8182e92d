"""What the machine itself can do: plain reads of the same bytes, with no checkpoint logic at all.

``pread``: several threads read exactly the payload bytes straight into the destination tensors.

A ceiling is the best of a grid of settings, tried in the same run. What limits a cold load is in ``disk.py``, the other
limit of a warm one in ``memory.py``.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.budget import Budget
from benchmarks.contenders import Contender, Sample
from benchmarks.destinations import Destinations, bytes_of
from benchmarks.payloads import Segment, payload_segments
from benchmarks.workloads import MIB

# Settings that are tried again, since the first try of each may have met a slow or a fast spell of the machine.
FINALISTS = 4


@dataclass(frozen=True)
class Setting:
    threads: int
    # Of one request.
    block_bytes: int
    # What a request reads into, over and over; None: memory as large as the request.
    buffer_bytes: int | None = None
    # How, where a ceiling knows several ways.
    way: str = ""

    def __str__(self) -> str:
        text = f"{self.threads} {'thread' if self.threads == 1 else 'threads'} x {self.block_bytes // MIB} MiB"
        text = text if self.buffer_bytes is None else f"{text} into {self.buffer_bytes // MIB} MiB"
        return f"{self.way}, {text}" if self.way else text


@dataclass(frozen=True)
class Ceiling:
    """Plain reads, with the setting that was best here, and what the other settings took."""

    name: str
    best: Setting
    tried: dict[str, float]
    # Settings that there was no time for.
    untried: int = 0

    def __str__(self) -> str:
        text = f"best of {len(self.tried)}"
        if self.untried:
            text += f", no time for {self.untried} more"
        return f"{self.name}: {self.best} ({text})"


@dataclass(frozen=True)
class TunedCeiling(Ceiling):
    """A ceiling that can take part in the rounds of this process."""

    contender: Contender = field(kw_only=True)


# The memory that a segment is read into, by the thread of this number: one piece after the other.
MemoryOf = Callable[[Segment, int], list[memoryview]]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def pread_ceiling(checkpoint: Path, destinations: Destinations, budget: Budget) -> TunedCeiling | None:
    """None where what is wanted is not contiguous in the files, or stored as a dtype of another size."""
    segments = payload_segments(checkpoint, destinations)
    if segments is None or sum(segment.length for segment in segments) != destinations.nbytes:
        return None
    memory_of = into_tensors(destinations.local)
    return tuned(
        "pread",
        lambda setting: read_segments(segments, setting, memory_of),
        [Setting(count, block) for block in (4 * MIB, 16 * MIB) for count in sorted({2, 4, 8, min(cores(), 32)})],
        budget,
        fills_destinations=True,
    )


def into_tensors(tensors: dict[str, torch.Tensor]) -> MemoryOf:
    """Straight into the tensors that want the segments."""
    memory = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    return lambda segment, _: [memory[segment.tensor][segment.start : segment.start + segment.length]]


def read_segments(segments: list[Segment], setting: Setting, memory_of: MemoryOf) -> float:
    """Read all segments, and return how many seconds that took."""
    pieces = deque(piece for segment in segments for piece in segment.split(setting.block_bytes))
    paths = sorted({segment.path for segment in segments})

    with opened(paths, 0) as fds:

        def worker(index: int) -> None:
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    return
                _read_fully(fds[piece.path], piece.offset, memory_of(piece, index))

        return timed_on_threads(setting.threads, worker)


def tuned(
    name: str,
    run: Callable[[Setting], float],
    settings: Sequence[Setting],
    budget: Budget,
    *,
    fills_destinations: bool,
) -> TunedCeiling:
    """Try every setting once, and the fastest twice more, as far as the budget goes. The best median of those wins.

    A single try is not enough: the fastest of dozens may be one that met a fast spell of the machine.
    """
    tries: dict[Setting, list[float]] = {}
    for setting in settings:
        if tries and not budget.allows(max(tries.values())[0]):
            break
        tries[setting] = [run(setting)]
    finalists = sorted(tries, key=tries.__getitem__)[:FINALISTS]
    for setting in 2 * finalists:
        if budget.allows(2 * max(tries[setting])):
            tries[setting].append(run(setting))
    tried = {setting: statistics.median(seconds) for setting, seconds in tries.items()}
    best = min(finalists, key=tried.__getitem__)
    return TunedCeiling(
        name,
        best,
        {str(setting): seconds for setting, seconds in tried.items()},
        len(settings) - len(tried),
        contender=Contender(name, lambda: Sample(run(best)), fills_destinations),
    )


def _read_fully(fd: int, offset: int, memory: list[memoryview]) -> None:
    left = list(memory)
    while left:
        count = os.preadv(fd, left, offset)
        if count == 0:
            raise EOFError(f"the file ends at {offset}, {sum(map(len, left))} bytes too early")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def timed_on_threads(count: int, worker: Callable[[int], None]) -> float:
    """How many seconds the workers took. The clock starts when all threads are there: they are no part of the limit."""
    ready = threading.Barrier(count + 1)

    def start(index: int) -> None:
        ready.wait()
        worker(index)

    with ThreadPoolExecutor(count) as pool:
        workers = [pool.submit(start, index) for index in range(count)]
        ready.wait()
        started = time.perf_counter()
        for future in workers:
            future.result()  # raises what a worker raised
        return time.perf_counter() - started


@contextmanager
def opened(paths: list[Path], flags: int) -> Iterator[dict[Path, int]]:
    fds: dict[Path, int] = {}
    try:
        for path in paths:
            fds[path] = os.open(path, os.O_RDONLY | flags)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)
