"""A rank fails in an exchange, at any point: no other one waits for it, and the process group can be used again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import torch_load, torch_planner, torch_reader
from ranks import RankError, Ranks
from shared_reads import failure_of, load_shared, save_by_rows, state_dict, values_of
from torch.distributed.checkpoint.planner import LoadPlan

import dcp_fast
from dcp_fast import _native
from dcp_fast.ranks import exchange
from dcp_fast.ranks.exchange import Exchange

WORLD = 4
FAILING = 2
EIO = 5
LAYOUT = "replicas"  # most rounds
NODE = exchange._node

Fault = Callable[[ExitStack], None]


def be_on_nodes(ranks_per_node: int | None) -> None:
    """Have this process take its ranks for ones of several nodes, until it is told otherwise."""
    node = NODE if ranks_per_node is None else lambda: dist.get_rank() // ranks_per_node
    exchange._node = node


@pytest.fixture(params=[WORLD, 2], ids=["one node", "two nodes"], autouse=True)
def ranks_per_node(request: pytest.FixtureRequest, ranks: Ranks) -> Iterator[int]:
    """On two nodes what a rank reads is passed on by another one of the other node."""
    ranks.run(WORLD, be_on_nodes, request.param)
    yield request.param
    ranks.run(WORLD, be_on_nodes, None)


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "checkpoint"
    ranks.run(WORLD, save_by_rows, path)
    return path


def load_with(fault: Fault, path: Path) -> dict[int, str] | str:
    """Load with a fault on one rank, then without. What the first load failed with."""
    reader = dcp_fast.FileSystemReader(path, io="cached", threads=2)
    began = time.monotonic()
    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            fault(faults)
        failure = failure_of(partial(load_shared, state_dict(LAYOUT), path, storage_reader=reader))
    seconds = time.monotonic() - began
    assert seconds < 20, (seconds, failure)
    expected, state = state_dict(LAYOUT), state_dict(LAYOUT)
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path, storage_reader=reader)
    assert report.exchange_rounds > 4
    assert values_of(state) == values_of(expected)
    return failure


def sent_to_the_other_node(path: Path) -> tuple[int, int]:
    """What the first ranks send to the others, and what all of that takes."""
    sent = 0
    original = Exchange._begin_round

    def begin(self: Exchange, round: int, sizes: tuple[list[int], list[int]], *args: Any) -> Any:
        nonlocal sent
        sent += sum(sizes[0][2:]) if dist.get_rank() < 2 else sum(sizes[0][:2])
        return original(self, round, sizes, *args)

    with mock.patch.object(Exchange, "_begin_round", begin):
        report = load_shared(state_dict(LAYOUT), path)
    return sent, report.bytes_needed


def test_ranks_pass_on_what_they_received(ranks: Ranks, checkpoint: Path, ranks_per_node: int) -> None:
    """What is tested here is tested with relays."""
    results = ranks.run(WORLD, sent_to_the_other_node, checkpoint)
    times = sum(sent for sent, _ in results) / results[0][1]
    assert (times < 1.3) if ranks_per_node == 2 else (times > 1.9)


def inject(nth: int, faults: ExitStack) -> None:
    faults.enter_context(_native.FaultInjection("pread", nth, EIO, repeat=1 << 30))


def sweep_reads(path: Path, step: int) -> list[dict[int, str] | str]:
    found = []
    for nth in range(0, 10_000, step):
        found.append(load_with(partial(inject, nth), path))
        if found[-1] == "nothing":
            break
    return found


def test_reads_that_fail(ranks: Ranks, checkpoint: Path) -> None:
    results = ranks.run(WORLD, sweep_reads, checkpoint, 1, timeout=300)
    assert all(result == results[0] for result in results)
    *failures, last = results[0]
    assert last == "nothing"
    assert len(failures) > 6
    assert all(failure in ({FAILING: "MetadataAccessError"}, {FAILING: "FileAccessError"}) for failure in failures)
    assert failures[-1] == {FAILING: "FileAccessError"}


@contextmanager
def at_step(nth: int, action: Callable[[], None]) -> Iterator[None]:
    """Do something before one of the steps of rounds."""
    original = Exchange.share
    calls = 0

    def share(self: Exchange, find: Any) -> bool:
        def found() -> Any:
            need, step = find()

            def acting(*args: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == nth + 1:
                    action()
                return step(*args)

            return need, acting

        return original(self, found)

    with mock.patch.object(Exchange, "share", share):
        yield


def fail() -> None:
    raise RuntimeError("a placement that fails")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def act(nth: int, action: Callable[[], None], faults: ExitStack) -> None:
    faults.enter_context(at_step(nth, action))


def sweep_steps(path: Path, action: Callable[[], None]) -> list[dict[int, str] | str]:
    found = []
    for nth in range(1000):
        found.append(load_with(partial(act, nth, action), path))
        if found[-1] == "nothing":
            break
    return found


@pytest.mark.parametrize(("action", "error"), [(fail, "RuntimeError"), (interrupt, "KeyboardInterrupt")])
def test_every_round(ranks: Ranks, checkpoint: Path, action: Callable[[], None], error: str) -> None:
    results = ranks.run(WORLD, sweep_steps, checkpoint, action, timeout=300)
    *failures, last = results[0]
    assert last == "nothing"
    assert len(failures) > 4
    for rank, (*of_rank, _) in enumerate(results):
        assert all(failure == {FAILING: error} for failure in of_rank), rank


class Hooked(dcp_fast.DefaultLoadPlanner):
    def commit_tensor(self, item: Any, tensor: Any) -> None:
        super().commit_tensor(item, tensor)


def strike_at(nth: int, path: Path) -> tuple[dict[int, str] | str, int]:
    """Ctrl-C on a rank that only watches the exchange of the others."""
    calls = 0
    original = Exchange._begin_round

    def begin(self: Exchange, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth + 1 and dist.get_rank() == FAILING:
            interrupt()
        return original(self, *args)

    planner = Hooked() if dist.get_rank() == FAILING else None
    with mock.patch.object(Exchange, "_begin_round", begin):
        return failure_of(partial(load_shared, state_dict(LAYOUT), path, planner=planner)), calls


@pytest.mark.parametrize("nth", [0, 2, 4])
def test_interrupts_of_a_rank_that_declines(ranks: Ranks, checkpoint: Path, nth: int) -> None:
    for failure, calls in ranks.run(WORLD, strike_at, nth, checkpoint):
        assert failure == {FAILING: "KeyboardInterrupt"}
        assert calls <= nth + 2


def count_strikes(path: Path) -> int:
    """A handler that does not raise is called once for each Ctrl-C."""
    strikes: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *_: strikes.append(1))
    try:
        with at_step(1, interrupt):
            load_shared(state_dict(LAYOUT), path)
    finally:
        signal.signal(signal.SIGINT, before)
    return len(strikes)


def test_handlers_that_do_not_raise(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(2, count_strikes, checkpoint) == [1, 1]


class Nesting(dcp_fast.DefaultLoadPlanner):
    """Loads something else in the midst of a load."""

    def __init__(self, path: Path, method: str) -> None:
        super().__init__()
        self._other = path
        setattr(self, method, self._nested(getattr(self, method)))

    def _nested(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            dcp_fast.load({"plain": torch.zeros(51, 9)}, checkpoint_id=self._other, no_dist=True)
            return original(*args)

        return call


def load_nested(path: Path, method: str, on: list[int]) -> None:
    planner = Nesting(path, method) if dist.get_rank() in on else dcp_fast.DefaultLoadPlanner()
    expected, state = state_dict(LAYOUT), state_dict(LAYOUT)
    torch_load(expected, storage_reader=torch_reader(path))
    load_shared(state, path, planner=planner)
    assert values_of(state) == values_of(expected)


@pytest.mark.parametrize("method", ["finish_plan", "load_bytes", "commit_tensor"])
@pytest.mark.parametrize("on", [[1], [0, 1]])
def test_loads_within_loads(ranks: Ranks, checkpoint: Path, method: str, on: list[int]) -> None:
    ranks.run(2, load_nested, checkpoint, method, on)


class Raises(dcp_fast.DefaultLoadPlanner):
    """Fails before anything is exchanged, or after."""

    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self._fail)

    def _fail(self, *args: Any) -> Any:
        raise ArithmeticError("a planner that fails")


def load_with_planner(path: Path, method: str) -> dict[int, str] | str:
    planner = Raises(method) if dist.get_rank() == FAILING else torch_planner()
    return failure_of(partial(load_shared, state_dict(LAYOUT), path, planner=planner))


@pytest.mark.parametrize(
    "method", ["create_local_plan", "finish_plan", "resolve_tensor", "commit_tensor", "load_bytes"]
)
def test_planners_that_fail(ranks: Ranks, checkpoint: Path, method: str) -> None:
    assert ranks.run(WORLD, load_with_planner, checkpoint, method) == [{FAILING: "ArithmeticError"}] * WORLD


def no_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError


def lack_memory(name: str, faults: ExitStack) -> None:
    owner = Exchange if name == "_allocate" else _native
    lacking = SimpleNamespace(of_records=_native.Need.of_records, of_program=no_memory) if name == "Need" else no_memory
    faults.enter_context(mock.patch.object(owner, name, lacking))


@pytest.mark.parametrize("name", ["_allocate", "Exchange", "Need", "Program", "open_files"])
def test_memory_that_is_short(ranks: Ranks, checkpoint: Path, name: str) -> None:
    results = ranks.run(WORLD, load_with, partial(lack_memory, name), checkpoint)
    assert all(set(result) == {FAILING} for result in results)
    assert all(result[FAILING] in ("MemoryError", "OutOfMemoryError") for result in results)


def lack_memory_for_needs(path: Path) -> dict[int, str] | str:
    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            faults.enter_context(mock.patch.object(torch, "frombuffer", no_memory))
        return failure_of(partial(load_shared, state_dict("rows"), path))  # of which each rank needs its own


def test_memory_for_needs_is_short(ranks: Ranks, checkpoint: Path) -> None:
    for failure in ranks.run(WORLD, lack_memory_for_needs, checkpoint):
        assert set(failure) == {FAILING}
        assert "Memory" in failure[FAILING]


def cut_file_short(path: Path) -> dict[int, str] | str:
    mine = path.parent / f"short {dist.get_rank()}"
    mine.mkdir(exist_ok=True)
    for file in path.iterdir():
        content = file.read_bytes()
        cut = dist.get_rank() == FAILING and file.name == "__1_0.distcp"
        (mine / file.name).write_bytes(content[: len(content) // 2] if cut else content)
    return failure_of(partial(load_shared, state_dict(LAYOUT), mine))


def test_a_truncated_file(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(WORLD, cut_file_short, checkpoint) == [{FAILING: "TruncatedFileError"}] * WORLD


def die_in_round(path: Path, nth: int, ranks_per_node: int) -> None:
    be_on_nodes(ranks_per_node)
    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            act(nth, partial(os._exit, 3), faults)
        began = time.monotonic()
        failure = failure_of(partial(load_shared, state_dict(LAYOUT), path))
        died = path.parent / f"died {nth} {ranks_per_node} {dist.get_rank()}"
        died.write_text(f"{time.monotonic() - began} {failure}")
    time.sleep(2)  # so that all get that far


@pytest.mark.parametrize("nth", [0, 3])
def test_a_rank_that_dies(fresh_ranks: Ranks, checkpoint: Path, nth: int, ranks_per_node: int) -> None:
    with pytest.raises(RankError):
        fresh_ranks.run(WORLD, die_in_round, checkpoint, nth, ranks_per_node, timeout=30)
    for rank in {*range(WORLD)} - {FAILING}:
        seconds, _, failure = (checkpoint.parent / f"died {nth} {ranks_per_node} {rank}").read_text().partition(" ")
        assert float(seconds) < 10
        assert "RuntimeError" in failure or "DistBackendError" in failure


class Slow(dcp_fast.DefaultLoadPlanner):
    """Plans for a second on all ranks but one, which waits for them meanwhile."""

    def create_local_plan(self) -> LoadPlan:
        if dist.get_rank() != FAILING:
            time.sleep(1)
        return super().create_local_plan()


def interrupt_between(path: Path, share: bool) -> dict[int, str] | str:
    if dist.get_rank() == FAILING:
        threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    load = partial(dcp_fast.load, state_dict(LAYOUT), checkpoint_id=path, share_reads=share, planner=Slow())
    failure = failure_of(load)
    assert time.monotonic() - began < 20
    return failure


@pytest.mark.parametrize("share", [True, False])
def test_an_interrupt_while_ranks_agree(ranks: Ranks, checkpoint: Path, share: bool) -> None:
    """It takes effect when the others can hear of it, and they do not wait for this rank."""
    assert ranks.run(WORLD, interrupt_between, checkpoint, share) == [{FAILING: "KeyboardInterrupt"}] * WORLD


def fail_to_look_at_headers(at: int, faults: ExitStack) -> None:
    original, calls = Exchange._headers, iter(range(1_000_000))

    def headers(self: Exchange, *args: Any) -> list[tuple[bool, int]]:
        if next(calls) == at:
            raise MemoryError
        return original(self, *args)

    faults.enter_context(mock.patch.object(Exchange, "_headers", headers))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_no_memory_for_what_others_said(ranks: Ranks, checkpoint: Path, at: int) -> None:
    """The others learn of it one round later."""
    failures = ranks.run(WORLD, load_with, partial(fail_to_look_at_headers, at), checkpoint)
    assert failures == [{FAILING: "OutOfMemoryError"}] * WORLD
