"""Ranks whose planners have a ``commit_tensor`` of their own share reads, and it gets what it gets from torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import image
from hooked_planners import Doubling
from ranks import Ranks
from shared_reads import (
    LAYOUTS,
    failing_step,
    failure_of,
    load_by_torch,
    load_shared,
    save_by_rows,
    state_dict,
    values_of,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

import dcp_fast
from dcp_fast import _native
from dcp_fast.transfer import plan_transfer

WORLD = 4
FAILING = 2
Calls = list[tuple[str, Any, Any]]


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hooks") / "checkpoint"
    ranks.run(WORLD, save_by_rows, path)  # so that tensors have several boxes
    return path


class Committing(dcp.DefaultLoadPlanner):
    """Notes its calls where nobody can see it."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._note = calls.append

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self._note((item.dest_index.fqn, image(tensor), item))
        self.act(item, tensor)

    def all_of(self, fqn: str) -> torch.Tensor:
        value = self.state_dict[fqn]
        return value.to_local() if isinstance(value, DTensor) else value

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """What a planner does beyond looking."""


class Scaling(Committing):
    """Changes the box that has come."""

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        tensor.add_(1)


class ScalingAll(Committing):
    """Changes all of the tensor, whatever has come of it."""

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.all_of(item.dest_index.fqn).add_(1)


class Mirroring(Committing):
    """Writes to a tensor that comes later, and that has several boxes."""

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if item.dest_index.fqn == "model.cube":
            self.all_of("model.wide").fill_(7)


class Counting(Committing):
    """Counts, and adds that to what has come."""

    committed = 0

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed += 1
        tensor.add_(self.committed)


class Replacing(Committing):
    """Puts another tensor where the next boxes of this one go."""

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if item.dest_index.fqn == "plain":
            self.original_state_dict["plain"] = self.state_dict["plain"] = self.state_dict["plain"] * 2
        if item.dest_index.fqn == "model.small":
            self.all_of("model.tall").data = torch.full_like(self.all_of("model.tall"), 3)


def load_both(path: Path, layout: str, make: Callable[[Calls], Any]) -> dcp_fast.LoadReport:
    """Load with torch and with sharing, and compare. What the report says."""
    calls: list[Calls] = [[], []]
    expected, state = state_dict(layout), state_dict(layout)
    load_by_torch(expected, path, make(calls[0]))
    report = load_shared(state, path, planner=make(calls[1]))
    assert calls[1] == calls[0], layout
    assert len(calls[0]) > 0
    assert values_of(state) == values_of(expected), layout
    return report


def compare(path: Path, make: Callable[[Calls], Any], layouts: list[str]) -> list[tuple[int, int, str]]:
    reports = [load_both(path, layout, make) for layout in layouts]
    return [(report.bytes_read, report.exchange_rounds, report.sharing_fallback_reason) for report in reports]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("planner", [Committing, Scaling, ScalingAll, Mirroring, Counting, Replacing])
def test_as_under_torch(ranks: Ranks, checkpoint: Path, planner: Callable[[Calls], Any], world_size: int) -> None:
    layouts = [name for name, (dims, _) in LAYOUTS.items() if dims == 1 or world_size > 2]
    results = ranks.run(world_size, compare, checkpoint, planner, layouts, timeout=180)
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    for of_ranks in zip(*results, strict=True):
        assert all(rounds > 2 for _, rounds, _ in of_ranks)
        if planner is Committing:  # as if it had no hook
            assert sum(read for read, *_ in of_ranks) <= 1.1 * stored
            assert all(reason == "" for *_, reason in of_ranks)
    if planner is ScalingAll:
        assert any("read again" in reason for of_rank in results for *_, reason in of_rank)


def other_planners(calls: Calls) -> Any:
    """A planner for each rank: of all kinds."""
    planners = [Committing, Doubling, dcp.DefaultLoadPlanner, ScalingAll]
    planner = planners[dist.get_rank()]
    return planner(calls) if issubclass(planner, Committing) else planner()


def mix(path: Path) -> list[str]:
    reasons = []
    for layout in ("replicas", "HSDP"):
        expected, state = state_dict(layout), state_dict(layout)
        load_by_torch(expected, path, other_planners([]))
        reasons.append(load_shared(state, path, planner=other_planners([])).sharing_fallback_reason)
        assert values_of(state) == values_of(expected), layout
    return reasons


def test_ranks_with_planners_of_other_kinds(ranks: Ranks, checkpoint: Path) -> None:
    commits, resolves, plain, _ = ranks.run(WORLD, mix, checkpoint)
    assert commits == resolves == plain == ["", ""]


def no_program(*args: Any) -> Any:
    raise ArithmeticError("an error that has its turn later")


def load_one_by_one(path: Path, obstacle: str) -> str:
    """Something on one rank keeps its boxes from being in place before the first commit."""
    expected, state = state_dict("replicas"), state_dict("replicas")
    with ExitStack() as stack:
        if dist.get_rank() == FAILING:
            if obstacle == "memory":  # boxes that share it
                for values in (expected, state):
                    values["strided"] = values["plain"]
            elif obstacle == "program":
                original, calls = _native.Program, itertools.count()
                first = lambda *args: original(*args) if next(calls) else no_program()  # noqa: E731
                stack.enter_context(mock.patch.object(plan_transfer._native, "Program", first))
            else:
                stack.enter_context(torch.inference_mode())
                state = {**state, "plain": torch.zeros(51, 9)}
        report = load_shared(state, path, planner=Committing([]))
    load_by_torch(expected, path, Committing([]))
    assert values_of(state) == values_of(expected)
    return report.sharing_fallback_reason


@pytest.mark.parametrize("obstacle", ["memory", "program", "inference mode"])
def test_a_rank_that_cannot(ranks: Ranks, checkpoint: Path, obstacle: str) -> None:
    """Its boxes wait in memory for their turn."""
    assert ranks.run(WORLD, load_one_by_one, checkpoint, obstacle) == [""] * WORLD


class Raising(Committing):
    """Fails at one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__([])
        self._numbers = itertools.count(-at)

    def act(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if next(self._numbers) == 0:
            raise ArithmeticError("of the planner")


def raise_at(path: Path, at: int) -> dict[int, str] | str:
    planner = Raising(at) if dist.get_rank() == FAILING else Committing([])
    failure = failure_of(partial(load_shared, state_dict("replicas"), path, planner=planner))
    load_both(path, "replicas", Committing)  # the process group can be used again
    return failure


@pytest.mark.parametrize("at", [0, 5, 20])
def test_a_commit_that_raises(ranks: Ranks, checkpoint: Path, at: int) -> None:
    assert ranks.run(WORLD, raise_at, checkpoint, at) == [{FAILING: "ArithmeticError"}] * WORLD


def fail_in_rounds(path: Path, error: type[BaseException]) -> list[tuple[dict[int, str] | str, int]]:
    """Fail in every step of rounds, one load after another. What loads failed with, and how many commits they made."""
    found = []
    for nth in range(1000):
        commits: Calls = []
        with failing_step(nth, FAILING, error):
            failure = failure_of(partial(load_shared, state_dict("replicas"), path, planner=Committing(commits)))
        found.append((failure, len(commits)))
        if failure == "nothing":
            break
    load_both(path, "replicas", Committing)
    return found


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_round(ranks: Ranks, checkpoint: Path, error: type[BaseException]) -> None:
    """No rank takes a failed exchange for something to try again alone."""
    for rank, found in enumerate(ranks.run(WORLD, fail_in_rounds, checkpoint, error, timeout=300)):
        *failures, (last, commits) = found
        assert last == "nothing"
        assert commits > 0
        assert len(failures) > 6
        assert all(failure == {FAILING: error.__name__} for failure, _ in failures), rank
        # Of what fails when the last round has begun nobody is told: the others commit what has come.
        assert all(commits == 0 for _, commits in (failures if rank == FAILING else failures[:-2]))


def die_of_reads(path: Path) -> dict[int, str] | str:
    """A rank cannot read what the others wait for."""
    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            faults.enter_context(_native.FaultInjection("pread", 2, 5, repeat=1 << 30))
        reader = dcp_fast.FileSystemReader(path, io="cached", threads=2)
        planner = Committing([])
        return failure_of(partial(load_shared, state_dict("replicas"), path, planner=planner, storage_reader=reader))


def test_reads_that_fail(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(WORLD, die_of_reads, checkpoint) == [{FAILING: "FileAccessError"}] * WORLD
