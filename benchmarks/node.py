"""Cold loads by all ranks of one machine together: what its disk gives, and how long the slowest rank takes.

The ranks are gloo processes that live through all rounds, and start every load together. What the disk gives is what
the kernel counts: `read_bytes` of /proc/self/io, which leaves out whatever a rank finds in the page cache.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as load_with_torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from benchmarks import checkpoints, page_cache
from benchmarks.checkpoints import CheckpointSpec, Shapes
from benchmarks.destinations import POISON
from benchmarks.metadata_process import die_first
from benchmarks.verify import VerificationError

NAME = "node"
TITLE = "all ranks of one machine load together, cold"
ROUNDS = 3
# Bytes that the disk gives, per byte that any rank needs.
MOST_READ = 1.1
TORCH = "torch"
AWARE = "dcp_fast"
UNAWARE = "dcp_fast, ranks unaware"
_VARIABLES = ("LOCAL_WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Case:
    """Who loads what. Together the ranks need all of the checkpoint."""

    name: str
    title: str
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def ranks(self) -> int:
        count = 1
        for size in self.mesh:
            count *= size
        return count


CASES = (
    Case("alone", "1 rank, everything", (1,), (Replicate(),)),
    Case("whole", "8 ranks, everything each", (8,), (Replicate(),)),
    Case("hsdp", "8 ranks, 2 replicas by 4 shards", (2, 4), (Replicate(), Shard(0))),
    Case("columns", "8 ranks, 1/8 of the columns each", (8,), (Shard(1),)),
    Case("rows", "8 ranks, 1/8 of the rows each", (8,), (Shard(0),)),
)


@dataclass(frozen=True)
class RankSample:
    seconds: float
    bytes_from_disk: int


# Of all ranks, in their order.
Sample = list[RankSample]


@dataclass(frozen=True)
class Measurement:
    """All samples of a case, by who loaded."""

    case: str
    title: str
    bytes_needed: int
    samples: dict[str, list[Sample]]

    def seconds(self, way: str) -> float:
        return statistics.median(max(rank.seconds for rank in sample) for sample in self.samples[way])

    def read_per_needed(self, way: str) -> float:
        """Of the worst round."""
        most = max(sum(rank.bytes_from_disk for rank in sample) for sample in self.samples[way])
        return most / self.bytes_needed


def run(
    data: Path, scale: float, rounds: int | None, with_dcp_fast: bool, say: Callable[[str], None]
) -> list[Measurement]:
    """Measure all cases, each way in turns."""
    spec = CheckpointSpec("transformer", ranks=8, scale=scale)
    checkpoint = checkpoints.ensure(spec, data)
    measurements = []
    for case in CASES:
        say(f"{NAME}, {case.name}: {case.title}")
        with _ranks(case, checkpoint, spec.shapes()) as ranks:
            if with_dcp_fast:
                _verify(ranks)
            ways = [TORCH, *((UNAWARE, AWARE) if with_dcp_fast and case.ranks > 1 else (AWARE,) * with_dcp_fast)]
            samples: dict[str, list[Sample]] = {way: [] for way in ways}
            for index in range(rounds or ROUNDS):
                start = index % len(ways)
                for way in ways[start:] + ways[:start]:
                    page_cache.evict(checkpoints.files_of(checkpoint))
                    samples[way].append(_asked(ranks, ("load", way)))
        measurement = Measurement(case.name, case.title, spec.payload_bytes(), samples)
        measurements.append(measurement)
        say("  " + ", ".join(f"{way} {measurement.seconds(way):.3f} s" for way in ways))
    return measurements


def _verify(ranks: Sequence[Connection]) -> None:
    """dcp_fast loads what torch loads on every rank, starting from overwritten memory."""
    _asked(ranks, ("keep", TORCH))
    if not all(_asked(ranks, ("compare", AWARE))):
        raise VerificationError("dcp_fast and torch load different values")


def _asked(ranks: Sequence[Connection], request: tuple[str, str]) -> list[Any]:
    for connection in ranks:
        connection.send(request)
    answers = [connection.recv() for connection in ranks]
    for answer in answers:
        if isinstance(answer, str):
            raise RuntimeError(answer)
    return answers


@contextmanager
def _ranks(case: Case, checkpoint: Path, shapes: Shapes) -> Iterator[list[Connection]]:
    """Processes that answer requests until the end of the block."""
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        connections, started = [], []
        for rank in range(case.ranks):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=_serve, args=(theirs, rank, case, checkpoint, shapes, scratch))
            process.start()
            theirs.close()
            connections.append(ours)
            started.append(process)
        try:
            yield connections
        finally:
            for connection in connections:
                connection.close()
            for process in started:
                process.join()


def _serve(
    connection: Connection, rank: int, case: Case, checkpoint: Path, shapes: Shapes, scratch: str
) -> None:  # pragma: no cover - in a process of its own
    die_first()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=case.ranks)
    try:
        served = _Rank(rank, case, checkpoint, shapes)
        while True:
            try:
                request, way = connection.recv()
            except EOFError:
                return
            try:
                connection.send(getattr(served, request)(way))
            except Exception:
                connection.send(traceback.format_exc())
    finally:
        dist.destroy_process_group()


class _Rank:
    """One rank, and what it loads into."""

    def __init__(self, rank: int, case: Case, checkpoint: Path, shapes: Shapes) -> None:
        self._rank, self._ranks, self._checkpoint = rank, case.ranks, checkpoint
        mesh = init_device_mesh("cpu", case.mesh)
        self._state: dict[str, Any] = {}
        self._local: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            # A vector has no columns: it is split along the only dimension that it has.
            placements = [Shard(min(p.dim, len(shape) - 1)) if isinstance(p, Shard) else p for p in case.placements]
            sizes = list(shape)
            for placement, parts in zip(placements, case.mesh, strict=True):
                if isinstance(placement, Shard):
                    sizes[placement.dim] //= parts
            self._local[name] = torch.empty(sizes)
            self._state[name] = DTensor.from_local(self._local[name], mesh, placements, run_check=False)
        self._poison()
        self._kept: dict[str, torch.Tensor] = {}

    def load(self, way: str) -> RankSample:
        if way == TORCH:
            loader: Callable[..., None] = load_with_torch
        else:
            import dcp_fast

            loader = dcp_fast.load
        for variable, value in zip(_VARIABLES, (self._ranks, self._rank), strict=True):
            if way == AWARE:
                os.environ[variable] = str(value)
            else:
                os.environ.pop(variable, None)
        dist.barrier()
        before, start = _bytes_from_disk(), time.perf_counter()
        loader(self._state, checkpoint_id=self._checkpoint)
        return RankSample(time.perf_counter() - start, _bytes_from_disk() - before)

    def keep(self, way: str) -> bool:
        self._poison()
        self.load(way)
        self._kept = {name: tensor.clone() for name, tensor in self._local.items()}
        return True

    def compare(self, way: str) -> bool:
        self._poison()
        self.load(way)
        same = all(
            torch.equal(tensor.view(torch.uint8), self._local[name].view(torch.uint8))
            for name, tensor in self._kept.items()
        )
        self._kept = {}
        return same

    def _poison(self) -> None:
        for tensor in self._local.values():
            tensor.view(torch.uint8).fill_(POISON)


def _bytes_from_disk() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        name, value = line.split(":")
        if name == "read_bytes":
            return int(value)
    raise RuntimeError("the kernel does not count what processes read")


HEADINGS = ("cold, together", "way", "s", "GB from disk", "read/needed", "target", "met")


def table_lines(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One for each case and way, under HEADINGS."""
    lines = []
    for measurement in measurements:
        for way in measurement.samples:
            ratio = measurement.read_per_needed(way)
            bounded = way == AWARE
            lines.append(
                [
                    f"{measurement.case}: {measurement.title}",
                    way,
                    f"{measurement.seconds(way):.3f}",
                    f"{ratio * measurement.bytes_needed / 1e9:.2f}",
                    f"{ratio:.3f}",
                    f"<={MOST_READ:.2f} read/needed" if bounded else "-",
                    ("yes" if ratio <= MOST_READ else "NO") if bounded else "-",
                ]
            )
    return lines
