"""Ranks whose planners tell only item by item where tensors go share reads, and the planners are called as by torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hooked_planners import Doubling, Elsewhere, OtherDtype, Recording, Scratch
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
from tensor_subclasses import Negated
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

import dcp_fast
from dcp_fast import _native
from dcp_fast.transfer import shared_reads
from dcp_fast.transfer.shared_reads import SharedReads

WORLD = 4
FAILING = 2
BLOCK_BYTES = 256 << 10  # the least that one rank reads at a time


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resolving") / "checkpoint"
    ranks.run(WORLD, save_by_rows, path)  # so that tensors have several boxes
    return path


class Calling(Recording, dcp.DefaultLoadPlanner):
    """Notes all calls where everybody can see it."""


class Quiet(dcp.DefaultLoadPlanner):
    """Keeps nothing, so that windows grow."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item)


class LargeScratch(Scratch):
    scratch_bytes = 1 << 20


class Numbering(dcp.DefaultLoadPlanner):
    """Adds to each box how many came before it."""

    numbers: tuple[int, int] = (0, 0)

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.numbers = (self.numbers[0] + 1, self.numbers[1])
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.numbers = (self.numbers[0], self.numbers[1] + 1)
        tensor.add_(10 * self.numbers[0] + self.numbers[1])


class Turning(dcp.DefaultLoadPlanner):
    """Drops all but its first few boxes, which it keeps to itself."""

    def __init__(self) -> None:
        super().__init__()
        dropped = iter([False] * 2 + [True] * 1000)
        self._dropped = lambda: next(dropped)  # in a closure, where nobody looks

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        return torch.empty_like(tensor) if self._dropped() else tensor


class Spreading(dcp.DefaultLoadPlanner):
    """Writes to tensors that come later, and to those that came before."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        for name in ("plain", "strided"):
            self.state_dict[name].add_(1)


PLANNERS = [Calling, Quiet, Numbering, Turning, Spreading, Doubling, LargeScratch, OtherDtype, Elsewhere]


@contextmanager
def room(most_bytes: int | None) -> Iterator[None]:
    """Have so little room for batches that boxes are cut."""
    with ExitStack() as stack:
        if most_bytes is not None:
            stack.enter_context(mock.patch.object(SharedReads, "most_bytes", most_bytes))
        yield


def load_both(path: Path, layout: str, make: Callable[[], Any], most_bytes: int | None = None) -> dcp_fast.LoadReport:
    """Load with torch and with sharing, and compare. What the report says."""
    theirs, ours = make(), make()
    expected, state = state_dict(layout), state_dict(layout)
    load_by_torch(expected, path, theirs)
    with room(most_bytes):
        report = load_shared(state, path, planner=ours)
    assert values_of(state) == values_of(expected), layout
    if isinstance(ours, Recording):
        assert ours.calls == theirs.calls
        assert len(ours.calls) > 10
    return report


def compare(path: Path, make: Callable[[], Any], layouts: list[str], most_bytes: int | None) -> list[tuple[int, str]]:
    reports = [load_both(path, layout, make, most_bytes) for layout in layouts]
    return [(report.bytes_read, report.sharing_fallback_reason) for report in reports]


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.distcp"))


@pytest.mark.parametrize("most_bytes", [None, 70_001])
@pytest.mark.parametrize("planner", PLANNERS)
def test_as_under_torch(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any], most_bytes: int | None) -> None:
    layouts = list(LAYOUTS) if most_bytes is None else ["replicas", "columns"]
    results = ranks.run(WORLD, compare, checkpoint, planner, layouts, most_bytes, timeout=180)
    for layout, of_ranks in zip(layouts, zip(*results, strict=True), strict=True):
        assert all(reason == "" for _, reason in of_ranks), of_ranks
        assert sum(read for read, _ in of_ranks) <= 1.1 * stored_bytes(checkpoint), layout


def other_planner() -> Any:
    return [Quiet, dcp.DefaultLoadPlanner, Calling, dcp_fast.DefaultLoadPlanner][dist.get_rank()]()


def test_ranks_with_other_planners(ranks: Ranks, checkpoint: Path) -> None:
    for found in ranks.run(WORLD, compare, checkpoint, other_planner, ["replicas", "HSDP"], 70_001):
        assert all(reason == "" for _, reason in found)


def of_other_sizes(path: Path) -> int:
    """Each rank needs another number of batches, and one needs nothing."""
    names = ["model", "plain", "strided", "step"]

    def wanted() -> dict[str, Any]:
        return {name: state_dict("replicas")[name] for name in names[dist.get_rank() :]} if dist.get_rank() < 3 else {}

    expected, state = wanted(), wanted()
    load_by_torch(expected, path, Doubling())
    with room(20_000 * (1 + dist.get_rank())):
        report = load_shared(state, path, planner=Doubling())
    assert values_of(state) == values_of(expected)
    return report.exchange_rounds


def test_ranks_with_other_numbers_of_batches(ranks: Ranks, checkpoint: Path) -> None:
    assert min(ranks.run(WORLD, of_other_sizes, checkpoint)) > 20


def load_in_batches(path: Path, count: int, elements: int) -> int:
    """How much this rank reads of replicas, in batches each of which is read by two ranks at the most."""
    names = [f"t{number:03}" for number in range(count)]
    if dist.get_rank() == 0:
        dcp.save({name: torch.full((elements,), 1.0) for name in names}, checkpoint_id=path, no_dist=True)
    dist.barrier()
    state = {name: torch.zeros(elements) for name in names}
    with room(BLOCK_BYTES + 40_000):
        report = load_shared(state, path, planner=Quiet())
    assert all(torch.equal(tensor, torch.ones(elements)) for tensor in state.values())
    return report.bytes_read


def test_all_ranks_read_equally_much_of_many_batches(ranks: Ranks, tmp_path: Path) -> None:
    read = ranks.run(WORLD, load_in_batches, tmp_path / "batches", 120, 25_000)
    assert max(read) <= 1.1 * sum(read) / WORLD + BLOCK_BYTES, read


def count_opens(path: Path, count: int) -> tuple[int, int]:
    """How often this rank opens files, and in how many batches their tensors come."""
    names = [f"t{number:03}" for number in range(count)]
    if dist.get_rank() == 0:
        writer = dcp.FileSystemWriter(path, single_file_per_rank=False)
        dcp.save({name: torch.arange(1000.0) for name in names}, storage_writer=writer, no_dist=True)
    dist.barrier()
    state = {name: torch.zeros(1000) for name in names}
    with room(5000), _native.FaultInjection("open", nth=-1) as opens:
        report = load_shared(state, path, planner=Quiet())
    assert all(torch.equal(tensor, torch.arange(1000.0)) for tensor in state.values())
    return opens.calls, report.exchange_rounds


def test_files_are_not_opened_for_each_batch(ranks: Ranks, tmp_path: Path) -> None:
    count = 50
    for opens, rounds in ranks.run(WORLD, count_opens, tmp_path / "files", count):
        assert rounds > count
        assert opens < 5 * count


def load_without_hooks(path: Path) -> str:
    """Destinations whose memory nobody knows are filled one after another, too."""

    expected, state = ({**state_dict("replicas"), "plain": Negated.make(torch.zeros(51, 9))} for _ in range(2))
    load_by_torch(expected, path)
    report = load_shared(state, path)
    assert values_of(state) == values_of(expected)
    return report.sharing_fallback_reason


def test_destinations_that_torch_alone_can_write_to(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(2, load_without_hooks, checkpoint) == ["", ""]


class Overwriting(dcp.DefaultLoadPlanner):
    """Resolves to memory of its own once, and writes to what the window has when its first box is committed."""

    def __init__(self) -> None:
        super().__init__()
        calls = itertools.count()
        self._calls = lambda: next(calls)  # in a closure, where nobody looks

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if self._calls() == 20:
            for value in self.state_dict.values():
                if isinstance(value, torch.Tensor):
                    value.fill_(1)


def overwrite(path: Path) -> tuple[int, str]:
    if dist.get_rank() == 0:
        dcp.save({f"t{i:03}": torch.full((100,), i) for i in range(100)}, checkpoint_id=path, no_dist=True)
    dist.barrier()
    expected, state = ({f"t{i:03}": torch.zeros(100, dtype=torch.int64) for i in range(100)} for _ in range(2))
    load_by_torch(expected, path, Overwriting())
    with room(2_000):
        report = load_shared(state, path, planner=Overwriting())
    assert values_of(state) == values_of(expected)
    return report.bytes_read, report.sharing_fallback_reason


def test_what_is_gone_is_read_again(ranks: Ranks, tmp_path: Path) -> None:
    """A commit wrote to tensors of its window, whose batches have made room for others since."""
    for _, reason in ranks.run(2, overwrite, tmp_path / "many"):
        assert "read again" in reason


class QuantizedDoubling(Doubling):
    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.target = dcp.DefaultLoadPlanner.resolve_tensor(self, item)
        return self.target

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor is not None


def load_fallback(path: Path) -> tuple[int, int]:
    """Load what only torch can read."""
    stored = {f"q{i}": torch.quantize_per_tensor(torch.rand(300, 100), 0.1, 0, torch.qint8) for i in range(8)}
    if dist.get_rank() == 0:
        dcp.save({**stored, "plain": torch.ones(300)}, checkpoint_id=path, no_dist=True)
    dist.barrier()
    zero = torch.quantize_per_tensor(torch.zeros(300, 100), 0.1, 0, torch.qint8)
    expected, state = ({**{name: zero.clone() for name in stored}, "plain": torch.zeros(300)} for _ in range(2))
    load_by_torch(expected, path, QuantizedDoubling())
    report = load_shared(state, path, exchange_bytes=16 << 20, planner=QuantizedDoubling())
    assert all(torch.equal(state[name].int_repr(), expected[name].int_repr()) for name in stored)
    assert torch.equal(state["plain"], expected["plain"])
    assert report.fallback_records == 8
    return report.bytes_read, stored_bytes(path)


def test_records_that_torch_reads_are_read_once(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(WORLD, load_fallback, tmp_path / "fallback")
    assert sum(read for read, _ in results) < 1.3 * results[0][1]


class Failing(Quiet):
    """Fails at one call of a hook."""

    def __init__(self, name: str, at: int) -> None:
        super().__init__()
        original, number = getattr(self, name), itertools.count(-at).__next__

        def hook(*args: Any) -> Any:
            if number() >= 0:
                raise ArithmeticError("of the planner")
            return original(*args)

        setattr(self, name, hook)


def raise_at(path: Path, name: str, at: int, most_bytes: int | None) -> dict[int, str] | str:
    planner = Failing(name, at) if dist.get_rank() == FAILING else Quiet()
    with room(most_bytes):
        failure = failure_of(partial(load_shared, state_dict("replicas"), path, planner=planner))
    load_both(path, "replicas", Quiet)  # the process group can be used again
    return failure


@pytest.mark.parametrize("most_bytes", [None, 70_001])
@pytest.mark.parametrize(
    ("name", "at"), [("resolve_tensor", 0), ("resolve_tensor", 9), ("commit_tensor", 6), ("load_bytes", 1)]
)
def test_hooks_that_raise(ranks: Ranks, checkpoint: Path, name: str, at: int, most_bytes: int | None) -> None:
    assert ranks.run(WORLD, raise_at, checkpoint, name, at, most_bytes) == [{FAILING: "ArithmeticError"}] * WORLD


def fail_in_rounds(path: Path, error: type[BaseException]) -> list[dict[int, str] | str]:
    """Fail in every step of rounds, one load after another. What loads failed with."""
    found: list[dict[int, str] | str] = []
    for nth in range(1000):
        with failing_step(nth, FAILING, error), room(400_000):
            found.append(failure_of(partial(load_shared, state_dict("replicas"), path, planner=Quiet())))
        if found[-1] == "nothing":
            break
    load_both(path, "replicas", Quiet)
    return found


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_round(ranks: Ranks, checkpoint: Path, error: type[BaseException]) -> None:
    """No rank takes a failed exchange for something to try again alone."""
    for rank, found in enumerate(ranks.run(WORLD, fail_in_rounds, checkpoint, error, timeout=300)):
        *failures, last = found
        assert last == "nothing"
        assert len(failures) > 10
        assert all(failure == {FAILING: error.__name__} for failure in failures), rank


def no_memory(*_: Any) -> Any:
    raise MemoryError


def lack(path: Path, what: str) -> dict[int, str] | str:
    with ExitStack() as faults:
        if dist.get_rank() == FAILING and what == "memory":
            faults.enter_context(mock.patch.object(shared_reads, "allocate", no_memory))
        elif dist.get_rank() == FAILING:
            faults.enter_context(_native.FaultInjection("pread", 4, 5, repeat=1 << 30))
        reader = dcp_fast.FileSystemReader(path, io="cached", threads=2)
        load = partial(load_shared, state_dict("replicas"), path, planner=Quiet(), storage_reader=reader)
        return failure_of(load)


@pytest.mark.parametrize(("what", "error"), [("memory", "OutOfMemoryError"), ("reads", "FileAccessError")])
def test_a_rank_that_fails(ranks: Ranks, checkpoint: Path, what: str, error: str) -> None:
    assert ranks.run(WORLD, lack, checkpoint, what) == [{FAILING: error}] * WORLD


class Reaching(Quiet):
    """Plans one box beyond its tensor."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        if dist.get_rank() != FAILING:
            return plan
        wrong = next(number for number, item in enumerate(plan.items) if item.dest_index.fqn == "plain")
        item = plan.items[wrong]
        beyond = ReadItem(
            item.type, item.dest_index, item.dest_offsets, item.storage_index, torch.Size([7, 3]), torch.Size([51, 9])
        )
        items = [*plan.items[:wrong], beyond, *plan.items[wrong + 1 :]]
        return LoadPlan(items, storage_data=plan.storage_data, planner_data=plan.planner_data)


def reach(path: Path) -> tuple[Any, Any]:
    alone = failure_of(partial(dcp_fast.load, state_dict("replicas"), checkpoint_id=path, planner=Reaching()))
    return alone, failure_of(partial(load_shared, state_dict("replicas"), path, planner=Reaching()))


def test_a_box_beyond_its_tensor(ranks: Ranks, checkpoint: Path) -> None:
    for alone, shared in ranks.run(WORLD, reach, checkpoint):
        assert alone == shared
