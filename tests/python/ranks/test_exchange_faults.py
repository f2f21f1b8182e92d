"""A rank fails in an exchange, at any point: no other one waits for it, and the process group can be used again."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fault_watch import ATTEMPTS, MOST_SECONDS, Seen, assert_told_in_time, note_fault, see
from helpers import torch_load, torch_planner, torch_reader
from ranks import RankError, Ranks
from shared_reads import at_step, failure_of, load_shared, save_by_rows, state_dict, values_of
from torch.distributed.checkpoint.planner import LoadPlan

import dcp_fast
from dcp_fast import _native
from dcp_fast.ranks import exchange
from dcp_fast.ranks.all_to_all import ToAll
from dcp_fast.ranks.exchange import Exchange
from dcp_fast.ranks.round_memory import RoundMemory

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


def load_with(fault: Fault, path: Path) -> Seen:
    """Load with a fault on one rank, then without. What this rank saw of the first load."""
    reader = dcp_fast.FileSystemReader(path, io="cached", threads=2)
    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            fault(faults)
        seen = see(partial(load_shared, state_dict(LAYOUT), path, storage_reader=reader))
    expected, state = state_dict(LAYOUT), state_dict(LAYOUT)
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path, storage_reader=reader)
    assert report.exchange_rounds > 4
    assert values_of(state) == values_of(expected)
    return seen


def sweep(path: Path, fault: Callable[[int, ExitStack], None]) -> list[Seen]:
    """Load with a fault at one point after another, until the load is over before it comes."""
    found = []
    for nth in range(10_000):
        found.append(load_with(partial(fault, nth), path))
        if found[-1].failure == "nothing":
            break
    return found


def assert_sweep(ranks: Ranks, path: Path, fault: Callable[[int, ExitStack], None]) -> list[dict[int, str] | str]:
    """All ranks fail alike, and in time, wherever the fault comes. What with, without the last load, which succeeds."""
    results = ranks.run(WORLD, sweep, path, fault, timeout=300)
    *failures, last = ([seen.failure for seen in of_fault] for of_fault in zip(*results, strict=True))
    assert last == ["nothing"] * WORLD
    for nth, of_ranks in enumerate(failures):
        assert of_ranks == [of_ranks[0]] * WORLD, nth
        seen = [result[nth] for result in results]
        assert_told_in_time(seen, lambda nth=nth: ranks.run(WORLD, load_with, partial(fault, nth), path))
    return [of_ranks[0] for of_ranks in failures]


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


def test_reads_that_fail(ranks: Ranks, checkpoint: Path) -> None:
    failures = assert_sweep(ranks, checkpoint, inject)
    assert len(failures) > 6
    assert all(failure in ({FAILING: "MetadataAccessError"}, {FAILING: "FileAccessError"}) for failure in failures)
    assert failures[-1] == {FAILING: "FileAccessError"}


def fail() -> None:
    raise RuntimeError("a placement that fails")


def interrupt() -> None:
    note_fault()
    os.kill(os.getpid(), signal.SIGINT)


def act(action: Callable[[], None], nth: int, faults: ExitStack) -> None:
    faults.enter_context(at_step(nth, action))


@pytest.mark.parametrize(("action", "error"), [(fail, "RuntimeError"), (interrupt, "KeyboardInterrupt")])
def test_every_round(ranks: Ranks, checkpoint: Path, action: Callable[[], None], error: str) -> None:
    failures = assert_sweep(ranks, checkpoint, partial(act, action))
    assert len(failures) > 4
    assert failures == [{FAILING: error}] * len(failures)


class Hooked(dcp_fast.DefaultLoadPlanner):
    def commit_tensor(self, item: Any, tensor: Any) -> None:
        super().commit_tensor(item, tensor)


def strike_at(nth: int, path: Path) -> Seen:
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
        return see(partial(load_shared, state_dict(LAYOUT), path, planner=planner))


@pytest.mark.parametrize("nth", [0, 2, 4])
def test_interrupts_of_a_rank_that_declines(ranks: Ranks, checkpoint: Path, nth: int) -> None:
    def strike() -> list[Seen]:
        return ranks.run(WORLD, strike_at, nth, checkpoint)

    of_ranks = strike()
    assert [seen.failure for seen in of_ranks] == [{FAILING: "KeyboardInterrupt"}] * WORLD
    assert_told_in_time(of_ranks, strike)


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
        note_fault()
        raise ArithmeticError("a planner that fails")


def load_with_planner(path: Path, method: str) -> Seen:
    planner = Raises(method) if dist.get_rank() == FAILING else torch_planner()
    return see(partial(load_shared, state_dict(LAYOUT), path, planner=planner))


@pytest.mark.parametrize(
    "method", ["create_local_plan", "finish_plan", "resolve_tensor", "commit_tensor", "load_bytes"]
)
def test_planners_that_fail(ranks: Ranks, checkpoint: Path, method: str) -> None:
    def load() -> list[Seen]:
        return ranks.run(WORLD, load_with_planner, checkpoint, method)

    of_ranks = load()
    assert [seen.failure for seen in of_ranks] == [{FAILING: "ArithmeticError"}] * WORLD
    assert_told_in_time(of_ranks, load)


def no_memory(*args: Any, **kwargs: Any) -> Any:
    note_fault()
    raise MemoryError


def lack_memory(name: str, faults: ExitStack) -> None:
    owner = RoundMemory if name == "make_room" else _native
    lacking = SimpleNamespace(of_headers=_native.Need.of_headers, of_program=no_memory) if name == "Need" else no_memory
    faults.enter_context(mock.patch.object(owner, name, lacking))


@pytest.mark.parametrize("name", ["make_room", "Exchange", "Need", "Program", "open_files"])
def test_memory_that_is_short(ranks: Ranks, checkpoint: Path, name: str) -> None:
    def load() -> list[Seen]:
        return ranks.run(WORLD, load_with, partial(lack_memory, name), checkpoint)

    of_ranks = load()
    for seen in of_ranks:
        assert isinstance(seen.failure, dict)
        assert set(seen.failure) == {FAILING}
        assert seen.failure[FAILING] in ("MemoryError", "OutOfMemoryError")
    assert_told_in_time(of_ranks, load)


def lack_memory_for_own_need(faults: ExitStack) -> None:
    original, calls = torch.frombuffer, itertools.count()

    def frombuffer(*args: Any, **kwargs: Any) -> Any:
        # The first one is for the exchange as a whole: without it nothing is shared.
        return no_memory() if next(calls) > 0 else original(*args, **kwargs)

    faults.enter_context(mock.patch.object(torch, "frombuffer", frombuffer))


def lack_memory_for_needs_of_others(faults: ExitStack) -> None:
    """Where their sizes are known, and from there on until something wants memory."""
    empty, known = torch.empty, exchange.why_too_many

    def empty_once(*args: Any, **kwargs: Any) -> Any:
        torch.empty = empty  # type: ignore[misc]
        return no_memory()

    def sizes_are_known(*args: int) -> str:
        torch.empty = empty_once  # type: ignore[misc]
        return known(*args)

    faults.enter_context(mock.patch.object(exchange, "why_too_many", sizes_are_known))


def tell_at_first(first_bytes: int) -> None:
    exchange._FIRST_BYTES = first_bytes


@pytest.fixture(params=[exchange._FIRST_BYTES, 128], ids=["small needs", "large needs"])
def first_bytes(request: pytest.FixtureRequest, ranks: Ranks) -> Iterator[int]:
    """How much ranks tell in their first step. Larger needs take one more."""
    default = exchange._FIRST_BYTES
    ranks.run(WORLD, tell_at_first, request.param)
    yield request.param
    ranks.run(WORLD, tell_at_first, default)


@pytest.mark.parametrize("lack", [lack_memory_for_own_need, lack_memory_for_needs_of_others])
def test_memory_for_needs_is_short(
    ranks: Ranks, checkpoint: Path, first_bytes: int, lack: Callable[[ExitStack], None]
) -> None:
    def load() -> list[Seen]:
        return ranks.run(WORLD, load_with, lack, checkpoint)

    of_ranks = load()
    assert [seen.failure for seen in of_ranks] == [{FAILING: "OutOfMemoryError"}] * WORLD
    assert_told_in_time(of_ranks, load)


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


def die_in_round(path: Path, nth: int, ranks_per_node: int, told: Path) -> None:
    be_on_nodes(ranks_per_node)
    longest = see(partial(load_shared, state_dict(LAYOUT), path)).longest_round

    def die() -> None:
        (told / "died").write_text(repr(time.monotonic()))
        os._exit(3)

    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            act(die, nth, faults)
        seen = see(partial(load_shared, state_dict(LAYOUT), path))
    (told / f"rank {dist.get_rank()}").write_text(f"{seen.raised_at} {longest} {seen.failure}")
    time.sleep(2)  # so that all get that far


@pytest.mark.parametrize("nth", [0, 3])
def test_a_rank_that_dies(fresh_ranks: Ranks, checkpoint: Path, nth: int, ranks_per_node: int, tmp_path: Path) -> None:
    """The others raise in time, but for a machine that others use once."""
    late = []
    for attempt in range(ATTEMPTS):
        told = tmp_path / str(attempt)
        told.mkdir()
        with pytest.raises(RankError):
            fresh_ranks.run(WORLD, die_in_round, checkpoint, nth, ranks_per_node, told, timeout=60)
        died_at = float((told / "died").read_text())
        late = []
        for rank in {*range(WORLD)} - {FAILING}:
            raised_at, longest, failure = (told / f"rank {rank}").read_text().split(" ", 2)
            assert "RuntimeError" in failure or "DistBackendError" in failure
            if float(raised_at) - died_at > MOST_SECONDS + float(longest):
                late.append((rank, float(raised_at) - died_at, longest))
        if not late:
            return
    raise AssertionError(f"ranks raise too late: {late}")


def tells(path: Path) -> int:
    """How often ranks tell each other something in a load, but for rounds."""
    with mock.patch.object(ToAll, "tell", autospec=True, side_effect=ToAll.tell) as tell:
        load_shared(state_dict(LAYOUT), path)
    return tell.call_count


def die_while_ranks_agree(path: Path, first_bytes: int, nth: int, told: Path) -> None:
    tell_at_first(first_bytes)
    original, calls = ToAll.tell, itertools.count()

    def tell(self: ToAll, *args: Any) -> None:
        if next(calls) == nth:
            (told / "died").write_text(repr(time.monotonic()))
            os._exit(3)
        original(self, *args)

    with ExitStack() as faults:
        if dist.get_rank() == FAILING:
            faults.enter_context(mock.patch.object(ToAll, "tell", tell))
        failure = failure_of(partial(load_shared, state_dict(LAYOUT), path))
    (told / f"rank {dist.get_rank()}.part").write_text(f"{time.monotonic()} {failure}")
    (told / f"rank {dist.get_rank()}.part").rename(told / f"rank {dist.get_rank()}")
    # Nobody is saved by a process that ends.
    deadline = time.monotonic() + 20
    while len(list(told.glob("rank ?"))) < WORLD - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_rank_that_dies_while_ranks_agree(
    fresh_ranks: Ranks, ranks: Ranks, checkpoint: Path, ranks_per_node: int, first_bytes: int, tmp_path: Path
) -> None:
    """Whichever of them, and all others are alive meanwhile."""
    if ranks_per_node < WORLD:
        pytest.skip("ranks agree alike on all nodes")
    (count,) = {*ranks.run(WORLD, tells, checkpoint)}
    assert count == (7 if first_bytes == 128 else 5)  # three or two for each of two exchanges, and the last flags
    for nth in range(count):
        told = tmp_path / str(nth)
        told.mkdir()
        with pytest.raises(RankError):
            fresh_ranks.run(WORLD, die_while_ranks_agree, checkpoint, first_bytes, nth, told, timeout=60)
        died_at = float((told / "died").read_text())
        for rank in {*range(WORLD)} - {FAILING}:
            raised_at, failure = (told / f"rank {rank}").read_text().split(" ", 1)
            assert "RuntimeError" in failure or "DistBackendError" in failure, (nth, rank, failure)
            assert float(raised_at) - died_at < 10, (nth, rank)  # of the 60 that the group waits


class Slow(dcp_fast.DefaultLoadPlanner):
    """Plans for a second on all ranks but one, which waits for them meanwhile."""

    def create_local_plan(self) -> LoadPlan:
        if dist.get_rank() != FAILING:
            time.sleep(1)
        return super().create_local_plan()


def interrupt_between(path: Path, share: bool) -> Seen:
    if dist.get_rank() == FAILING:
        threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    return see(partial(dcp_fast.load, state_dict(LAYOUT), checkpoint_id=path, share_reads=share, planner=Slow()))


@pytest.mark.parametrize("share", [True, False])
def test_an_interrupt_while_ranks_agree(ranks: Ranks, checkpoint: Path, share: bool) -> None:
    """It takes effect when the others can hear of it, and they do not wait for this rank."""
    for seen in ranks.run(WORLD, interrupt_between, checkpoint, share):
        assert seen.failure == {FAILING: "KeyboardInterrupt"}
        assert len(seen.begun) == 0


def fail_to_look_at_headers(at: int, faults: ExitStack) -> None:
    original, calls = Exchange._headers, iter(range(1_000_000))

    def headers(self: Exchange, *args: Any) -> list[tuple[bool, int]]:
        if next(calls) == at:
            no_memory()
        return original(self, *args)

    faults.enter_context(mock.patch.object(Exchange, "_headers", headers))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_no_memory_for_what_others_said(ranks: Ranks, checkpoint: Path, at: int) -> None:
    """The others learn of it one round later."""

    def load() -> list[Seen]:
        return ranks.run(WORLD, load_with, partial(fail_to_look_at_headers, at), checkpoint)

    of_ranks = load()
    assert [seen.failure for seen in of_ranks] == [{FAILING: "OutOfMemoryError"}] * WORLD
    assert_told_in_time(of_ranks, load)
