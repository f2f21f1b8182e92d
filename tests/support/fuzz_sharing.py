"""Random loads of ranks that share what they read, each made from a seed and compared with loads that share nothing.

All ranks make the same checkpoint of a seed. What each of them wants of it is drawn apart: the same as another one,
something else, a shard of what all want, parts of it, or nothing.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fuzz_cases import HOST_ONLY, Case, Part, difference, make_case, same
from fuzz_safetensors import make_safetensors_case
from helpers import Outcome, image, load_with, torch_load, torch_planner
from hooked_planners import Elsewhere
from quantized_files import make_quantized_case
from shared_reads import ROUNDS_BYTES, be_on_nodes
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast
from dcp_fast.ranks import exchange
from dcp_fast.transfer.batches import ALIGNMENT
from dcp_fast.transfer.gpu import CudaLoad
from dcp_fast.transfer.shared_reads import SharedReads

__all__ = ["Said", "load_cases"]

_MAKERS: list[Callable[..., Case]] = [
    *[make_case] * 5,
    *[make_safetensors_case] * 3,
    *[make_quantized_case] * 2,
]
Calls = list[tuple[Any, ...]]


@dataclass
class Said:
    """What one rank says of one case.

    Attributes:
        seed: of the case.
        problems: what is wrong; empty if nothing is.
        is_shared: whether it took part in an exchange.
        rounds: in how many rounds.
        has_changed: whether torch's load changed anything.
        has_failed: whether torch's load failed on any rank.
        reason: why something was not shared.
        batches: whether memory for batches was so little that there are many.
        sent, received: bytes that it exchanged with others.
    """

    seed: int
    problems: list[str] = field(default_factory=list)
    is_shared: bool = False
    rounds: int = 0
    has_changed: bool = False
    has_failed: bool = False
    reason: str = ""
    batches: bool = False
    sent: int = 0
    received: int = 0


def load_cases(path: Path, seeds: Sequence[int], devices: Sequence[torch.device] = HOST_ONLY) -> list[Said]:
    """On each rank of a process group: load the cases of some seeds, all of which it says something of.

    Args:
        path: a folder for checkpoints.
        seeds: of the cases.
        devices: where destinations lie, each on one of them.
    """
    said = []
    with _all_groups() as groups:
        for seed in seeds:
            try:
                said.append(_load_case(path, seed, groups, devices))
            except BaseException as error:  # the others wait now, until the process group's time is up
                raise RuntimeError(f"the case of seed {seed} cannot be loaded") from error
    return said


@contextmanager
def _all_groups() -> Iterator[list[Any]]:
    """Ways to group the ranks: all of them, all but the last one, and every second one. Of each, this rank's group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ways = [[range(world - 1), range(world - 1, world)], [range(0, world, 2), range(1, world, 2)]]
    made = [[(ranks, dist.new_group(list(ranks))) for ranks in way] for way in ways if world > 2]
    yield [dist.group.WORLD, *(group for way in made for ranks, group in way if rank in ranks)]
    for way in made:
        for ranks, group in way:
            if rank in ranks:
                dist.destroy_process_group(group)


def _load_case(folder: Path, seed: int, groups: Sequence[Any], devices: Sequence[torch.device]) -> Said:
    rng = random.Random(f"job {seed}")  # the same on all ranks
    group = rng.choice([groups[0], *groups])
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    first = dist.get_global_rank(group, 0)  # groups that load at the same time have cases of their own
    own = random.Random(f"{_wants_of(rng, rank)} {first} {seed}")
    path = folder / f"{seed} of {first}"
    case = rng.choice(_MAKERS)(path, seed * dist.get_world_size() + first, devices, Part(own, rank, ranks))
    leave_out, leaves = own.choice([0, 0, 0, 0.5, 1]), own.random()
    make_planner = _planner(rng, own)
    # Of every second case memory for batches is so little that most loads have many. Ranks may differ in it.
    batch_bytes = (rng if rng.random() < 0.5 else own).choice([300, 1500, 5000, 40_000]) if seed % 2 else None
    case.description.append(
        f"rank {rank} of {ranks}, leaves out {leave_out} of it, {make_planner}, batches of {batch_bytes} bytes"
    )

    def make() -> dict[str, Any]:
        return _without(case.make(), leave_out, random.Random(leaves))

    if rank == 0:
        case.write()
    dist.barrier(group)
    said = Said(seed)
    try:
        said = _compare(seed, case, make, make_planner, batch_bytes, rng, group)
    finally:
        dist.barrier(group)
        if rank == 0:
            shutil.rmtree(path)
    return said


def _compare(
    seed: int,
    case: Case,
    make: Callable[[], Any],
    make_planner: Callable[[Calls], Any],
    batch_bytes: int | None,
    rng: random.Random,
    group: Any,
) -> Said:
    """Load by torch, alone, and together with other ranks."""
    calls: list[Calls] = [[], [], []]
    before = image(make())

    def load(number: int, function: Callable[..., None], reader: Any, **options: Any) -> Outcome:
        planner = make_planner(calls[number])
        if planner is None and function is torch_load:
            planner = torch_planner()
        return load_with(function, make(), storage_reader=reader, planner=planner, process_group=group, **options)

    expected = load(0, torch_load, case.torch_reader(case.path))
    alone = load(1, dcp_fast.load, case.fast_reader(case.path, **case.options))
    with _exchange_of(rng, group) as options, _batches_of(batch_bytes):
        shared = load(2, dcp_fast.load, case.fast_reader(case.path, **case.options), share_reads=True, **options)
    report = dcp_fast.last_report()
    assert report is not None
    said = Said(
        seed,
        is_shared=report.exchange_rounds > 0,
        rounds=report.exchange_rounds,
        has_changed=image(expected.state) != before,
        has_failed=expected.errors is not None,
        reason=report.sharing_fallback_reason,
        sent=report.bytes_sent,
        received=report.bytes_received,
        batches=batch_bytes is not None,
    )
    if not same(alone, expected):
        said.problems.append(f"alone: {difference(alone, expected)}")
    if not _same_but_for_others(shared, expected):
        said.problems.append(f"shared: {difference(shared, expected)}")
    for name, made in zip(["alone", "shared"], calls[1:], strict=True):
        if expected.errors is None and made != calls[0]:
            said.problems.append(f"{name}: the planner's hooks are called otherwise")
    if said.problems:
        said.problems += [*case.description, f"options of the exchange: {options}"]
    return said


def _same_but_for_others(actual: Outcome, expected: Outcome) -> bool:
    """As ``same``; but where several ranks fail, some may have left before they failed themselves."""
    if expected.errors is None or actual.errors is None:
        return same(actual, expected)
    if not actual.errors:
        return False
    return all(
        rank in expected.errors and isinstance(error, type(expected.errors[rank]))
        for rank, error in actual.errors.items()
    )


def _wants_of(rng: random.Random, rank: int) -> int:
    """A number that is equal on ranks which want the same."""
    return {"same": 0, "own": rank, "pairs": rank // 2, "two": rank % 2}[rng.choice(["same", "own", "pairs", "two"])]


def _without(state: Any, part: float, rng: random.Random) -> Any:
    """A state dict without some of its leaves, and without dicts that are empty then."""
    kept = {}
    for key, value in state.items():
        if isinstance(value, dict):
            if inner := _without(value, part, rng):
                kept[key] = inner
        elif rng.random() >= part:
            kept[key] = value
    return kept


@contextmanager
def _exchange_of(rng: random.Random, group: Any) -> Iterator[dict[str, Any]]:
    """Be on one of some nodes, and exchange in rounds of some size. Yields options of the load, as all ranks have."""
    options: dict[str, Any] = {}
    with ExitStack() as stack:
        if rng.random() < 0.4:
            stack.enter_context(be_on_nodes(rng.choice([1, 2, 3])))
        if rng.random() < 0.7:
            options["exchange_bytes"] = ROUNDS_BYTES
            # Most checkpoints are so small that this gives several rounds.
            stack.enter_context(mock.patch.object(exchange, "ROUND_PARTS", rng.choice([4, 64, 256, 1024])))
            # Or most needs are told in the first step.
            stack.enter_context(mock.patch.object(exchange, "_FIRST_BYTES", rng.choice([128, exchange._FIRST_BYTES])))
        yield options


@contextmanager
def _batches_of(size: int | None) -> Iterator[None]:
    if size is None:
        yield
        return
    aligned, half_bytes = max(size // ALIGNMENT, 1) * ALIGNMENT, CudaLoad.half_bytes
    with (
        mock.patch.object(SharedReads, "most_bytes", size),
        mock.patch.object(CudaLoad, "half_bytes", lambda load, wanted: half_bytes(load, min(aligned, wanted))),
    ):
        yield


# Planners


def _planner(rng: random.Random, own: random.Random) -> Callable[[Calls], Any]:
    """What makes the planner of this rank, with what notes the calls of its hooks."""
    kinds = [_no_planner, _torch_planner, Committing, Aside, Seeing, _elsewhere]
    if rng.random() < 0.4:
        return rng.choice([_no_planner, _torch_planner])
    return rng.choice(kinds) if rng.random() < 0.5 else own.choice(kinds)


def _no_planner(_: Calls) -> None:
    """Each load has its own."""


def _torch_planner(_: Calls) -> Any:
    return dcp.DefaultLoadPlanner()


def _elsewhere(_: Calls) -> Any:
    return Elsewhere()


def _noted(item: ReadItem, tensor: torch.Tensor) -> tuple[Any, ...]:
    index = item.dest_index
    return index.fqn, index.offset, index.index, hashlib.sha256(repr(image(tensor)).encode()).hexdigest()


class Committing(dcp.DefaultLoadPlanner):
    """Changes what has come."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._note = calls.append

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self._note(_noted(item, tensor))
        if tensor.dtype in (torch.float32, torch.int64):
            tensor.detach().add_(1)
        elif item.dest_index.fqn.endswith("3"):
            tensor.detach().zero_()


class Aside(Committing):
    """Loads into temporaries."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        return torch.zeros_like(self.target)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(item, tensor)
        self.target.detach().copy_(tensor)


class Seeing(dcp_fast.DefaultLoadPlanner):
    """Sees which tensors are looked up, and which values come."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._note = calls.append

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        self._note((index.fqn, index.offset, index.index))
        return super().lookup_tensor(index)

    def load_bytes(self, item: ReadItem, value: Any) -> None:
        self._note((item.dest_index.fqn, value.getvalue()))
        super().load_bytes(item, value)
