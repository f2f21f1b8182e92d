"""The steps that all ranks take together: how many collective calls a load takes, and a rank failing at each stage."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import save
from ranks import CollectiveCounter, Ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan

import dcp_fast

WORLD = 4


def destinations(count: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.zeros(3) for i in range(count)}


def values(count: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((3,), float(i + 1)) for i in range(count)}


# Successful loads


def count_collectives(path: Path, count: int) -> tuple[list[str], int, bool]:
    state = destinations(count)
    with CollectiveCounter() as counter:
        dcp_fast.load(state, checkpoint_id=path)
    return counter.calls, counter.bytes, all(torch.equal(state[k], v) for k, v in values(count).items())


@pytest.mark.parametrize("count", [1, 50])
def test_two_small_collective_calls(ranks: Ranks, tmp_path: Path, count: int) -> None:
    path = save(tmp_path, values(count))
    for calls, size, right in ranks.run(WORLD, count_collectives, path, count):
        assert calls == ["all_reduce", "all_reduce"]
        assert size == 2 * 2 * 8
        assert right


class GlobalPlanner(dcp_fast.DefaultLoadPlanner):
    """Looks at the plans of all ranks: each rank loads only every other item."""

    seen: list[int]

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return [LoadPlan(plan.items[rank % 2 :: 2]) for rank, plan in enumerate(global_plan)]


def load_with_global_plan(path: Path, everywhere: bool) -> list[str]:
    rank = dist.get_rank()
    state = destinations(6)
    planner = GlobalPlanner() if everywhere or rank == 0 else dcp_fast.DefaultLoadPlanner()
    dcp_fast.load(state, checkpoint_id=path, planner=planner)
    return [key for key, value in state.items() if value.any()]


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_global_step_of_any_rank_gets_all_plans(ranks: Ranks, tmp_path: Path, everywhere: bool) -> None:
    path = save(tmp_path, values(6))
    loaded = ranks.run(WORLD, load_with_global_plan, path, everywhere)
    assert all(len(keys) == 3 for keys in loaded)
    assert loaded[0] == loaded[2] != loaded[1] == loaded[3]


class FinishingPlanner(dcp_fast.DefaultLoadPlanner):
    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        return LoadPlan(new_plan.items[:1])


@pytest.mark.usefixtures("gloo")
def test_finish_plan_is_called(tmp_path: Path) -> None:
    state = destinations(3)
    dcp_fast.load(state, checkpoint_id=save(tmp_path, values(3)), planner=FinishingPlanner())
    assert sum(bool(value.any()) for value in state.values()) == 1


# Failures

FAILING = 2  # the rank


class UnsendableError(Exception):
    """Holds what no process can send to another."""

    def __init__(self) -> None:
        super().__init__("unsendable")
        self.lock = threading.Lock()


def fail_at(stage: str, error: type[BaseException]) -> tuple[Any, Any]:
    """A reader and a planner class of which the failing rank's raise at a stage."""

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error() if error is UnsendableError else error(stage)

    reader = type("Reader", (dcp_fast.FileSystemReader,), {})
    planner = type("Planner", (dcp_fast.DefaultLoadPlanner,), {})
    if dist.get_rank() == FAILING:
        owner = reader if hasattr(reader, stage) else planner
        setattr(owner, stage, failing)
    return reader, planner


def fail(path: Path, stage: str, error: type[BaseException], use: str) -> tuple[str, dict[int, str], bool]:
    reader, planner = fail_at(stage, error)
    state = destinations(3)
    load = dcp_fast.load if use == "fast" else dcp.load
    try:
        load(state, storage_reader=reader(path), planner=planner())
    except CheckpointException as failure:
        kinds = {rank: type(wrapped[0]).__name__ for rank, wrapped in failure.failures.items()}
        return str(failure.args[0]), kinds, any(value.any() for value in state.values())
    return "no failure", {}, True


@pytest.mark.parametrize(
    "stage", ["read_metadata", "set_up_storage_reader", "set_up_planner", "create_local_plan", "prepare_local_plan"]
)
def test_a_rank_that_fails_before_the_read(ranks: Ranks, tmp_path: Path, stage: str) -> None:
    """No rank loads anything, and all are told what torch would tell them."""
    path = save(tmp_path, values(3))
    fast = ranks.run(WORLD, fail, path, stage, OSError, "fast")
    expected = "AssertionError" if stage == "read_metadata" else "OSError"
    assert fast == [("plan", {FAILING: expected}, False)] * WORLD
    if stage != "read_metadata":  # where torch's other ranks would wait for ever
        assert fast == ranks.run(WORLD, fail, path, stage, OSError, "torch")


@pytest.mark.parametrize("stage", ["finish_plan", "read_data"])
def test_a_rank_that_fails_to_read(ranks: Ranks, tmp_path: Path, stage: str) -> None:
    path = save(tmp_path, values(3))
    results = ranks.run(WORLD, fail, path, stage, OSError, "fast")
    for rank, (step, kinds, loaded) in enumerate(results):
        assert (step, kinds) == ("read", {FAILING: "OSError"})
        assert loaded == (rank != FAILING)


@pytest.mark.parametrize("stage", ["create_local_plan", "read_data"])
def test_an_error_that_cannot_be_sent(ranks: Ranks, tmp_path: Path, stage: str) -> None:
    """The rank itself gets its error, the others one that shows it."""
    results = ranks.run(WORLD, fail, save(tmp_path, values(3)), stage, UnsendableError, "fast")
    for rank, (_, kinds, _) in enumerate(results):
        assert kinds == {FAILING: "UnsendableError" if rank == FAILING else "LoadError"}


def fail_in_global_step(path: Path) -> tuple[str, dict[int, str]]:
    class Planner(dcp_fast.DefaultLoadPlanner):
        def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
            raise ValueError("global")

    try:
        dcp_fast.load(destinations(3), checkpoint_id=path, planner=Planner())
    except CheckpointException as failure:
        return str(failure.args[0]), {rank: type(wrapped[0]).__name__ for rank, wrapped in failure.failures.items()}
    return "no failure", {}


def test_a_global_step_that_fails(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(WORLD, fail_in_global_step, save(tmp_path, values(3)))
    assert results == [("plan", {0: "ValueError"})] * WORLD


# Metadata that each rank saved for itself


def load_own(path: Path, failing: int) -> str:
    rank = dist.get_rank()
    state = {"t": torch.zeros(5)}
    if rank == failing:
        state["missing"] = torch.zeros(1)
    try:
        dcp_fast.load(state, checkpoint_id=path)
    except BaseException as error:
        return type(error).__name__
    return "loaded" if torch.equal(state["t"], torch.full((5,), float(rank + 1))) else "wrong"


def save_own(path: Path) -> None:
    rank = dist.get_rank()
    writer = dcp.FileSystemWriter(path, sync_files=False)
    dcp.save({"t": torch.full((5,), float(rank + 1))}, storage_writer=writer, use_collectives=False)


def test_rank_local_metadata(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(WORLD, save_own, tmp_path)
    assert ranks.run(WORLD, load_own, tmp_path, -1) == ["loaded"] * WORLD
    results = ranks.run(WORLD, load_own, tmp_path, FAILING)
    assert results[FAILING] == "RuntimeError"  # its own, as in torch, whose other ranks wait for ever
    assert all(result == "CheckpointException" for rank, result in enumerate(results) if rank != FAILING)
