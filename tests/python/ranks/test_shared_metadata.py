"""Metadata that one of four ranks reads for all: the same as each rank's own, and no rank waits for one that failed."""

from __future__ import annotations

import math
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import fill, image, save, torch_load
from metadata_cases import make_metadata, random_metadata
from ranks import CollectiveCounter, Ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

import dcp_fast
from dcp_fast import _native
from dcp_fast.metadata.read import parse_blocks
from dcp_fast.ranks import shared_metadata

WORLD = 4
FAILING = 2  # the rank
BLOCK_BYTES = 100

SHAPES = {f"t{i}": (i + 1, 3) for i in range(40)}


def values(seed: int = 0) -> dict[str, Any]:
    state: dict[str, Any] = {name: fill(shape, torch.float32, seed) for name, shape in SHAPES.items()}
    return {**state, "step": seed}


def destinations() -> dict[str, Any]:
    return {**{name: torch.zeros(shape) for name, shape in SHAPES.items()}, "step": -1}


@dataclass(frozen=True)
class Result:
    """What one rank saw of a load."""

    step: str
    failures: dict[int, str]
    state: Any  # as an image
    received: bool
    calls: list[str]

    def outcome(self) -> tuple[Any, ...]:
        """What must not depend on sharing."""
        return self.step, self.failures, self.state


@contextmanager
def small_files_are_shared(block_bytes: int = BLOCK_BYTES) -> Iterator[None]:
    with (
        mock.patch.object(shared_metadata, "_LEAST_BYTES", 0),
        mock.patch.object(shared_metadata, "_BLOCK_BYTES", block_bytes),
    ):
        yield


def load(
    paths: list[Path],
    share: bool = True,
    group: dist.ProcessGroup | None = None,
    reader: Callable[[Path], Any] | None = None,
    fault: Callable[[ExitStack], None] | None = None,
) -> Result:
    """Load on this rank, whose checkpoint is the last of the paths if it is the failing rank, else the first."""
    reader = reader or dcp_fast.FileSystemReader
    path = paths[-1 if dist.get_rank() == FAILING else 0]
    state = destinations()
    step, failures = "", {}
    with small_files_are_shared(), ExitStack() as faults, CollectiveCounter() as counter:
        if fault is not None:
            fault(faults)
        try:
            dcp_fast.load(state, storage_reader=reader(path), process_group=group, share_metadata=share)
        except CheckpointException as error:
            step = str(error.args[0])
            failures = {rank: f"{type(e[0]).__name__}: {e[0]}" for rank, e in error.failures.items()}
    report = dcp_fast.last_report()
    return Result(step, failures, image(state), report is not None and report.metadata_received, counter.calls)


def compare(ranks: Ranks, paths: list[Path], *args: Any) -> list[Result]:
    """Load with and without sharing, which must not differ but in how; return the results of sharing."""
    own = ranks.run(WORLD, load, paths, False, *args)
    shared: list[Result] = ranks.run(WORLD, load, paths, True, *args)
    assert [result.outcome() for result in shared] == [result.outcome() for result in own]
    assert not any(result.received for result in own)
    return shared


def received(results: list[Result]) -> list[bool]:
    return [result.received for result in results]


def blocks_of(path: Path) -> int:
    return math.ceil((path / ".metadata").stat().st_size / BLOCK_BYTES)


NOBODY = [False] * WORLD
ALL_BUT_THE_FIRST = [False, True, True, True]


# Successful loads


def test_all_ranks_load_what_torch_loads(ranks: Ranks, tmp_path: Path) -> None:
    results = compare(ranks, [save(tmp_path, values())])
    expected = destinations()
    torch_load(expected, checkpoint_id=tmp_path, no_dist=True)
    assert all(result.outcome() == ("", {}, image(expected)) for result in results)
    assert received(results) == ALL_BUT_THE_FIRST
    blocks = blocks_of(tmp_path)
    assert blocks > 2
    for result in results:
        assert result.calls == ["all_reduce", *["broadcast"] * blocks, "all_reduce", "all_reduce"]


def read_both_ways(path: Path, block_bytes: int) -> tuple[bool, bool, int]:
    reader = dcp_fast.FileSystemReader(path)
    with small_files_are_shared(block_bytes):
        shared = shared_metadata.share_metadata(reader, _DistWrapper(None, True, 1))()
    own = reader.read_metadata()
    assert shared.storage_meta is not None
    load_id_is_ours = shared.storage_meta.load_id == reader.load_id
    # Looked at one by one first, as the lookup of a key is not that of a dict which was filled.
    alike = all(shared.storage_data[key] == value for key, value in list((own.storage_data or {}).items()))
    return alike and shared == own, load_id_is_ours, dist.get_rank()


def write(path: Path, metadata: Any) -> None:
    path.mkdir(exist_ok=True)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("block_bytes", [1000, 1 << 20])
def test_metadata_of_every_kind(ranks: Ranks, tmp_path: Path, block_bytes: int) -> None:
    write(tmp_path, make_metadata())
    assert ranks.run(WORLD, read_both_ways, tmp_path, block_bytes) == [(True, True, rank) for rank in range(WORLD)]


def read_many_both_ways(path: Path, count: int) -> list[int]:
    return [number for number in range(count) if not all(read_both_ways(path / str(number), 500)[:2])]


def test_random_metadata(ranks: Ranks, tmp_path: Path) -> None:
    for number in range(50):
        write(tmp_path / str(number), random_metadata(random.Random(number)))
    assert ranks.run(WORLD, read_many_both_ways, tmp_path, 50) == [[]] * WORLD


def load_in_group(path: Path) -> list[Result]:
    """In groups of two ranks, of which the first is not that of the world, and of one."""
    results = []
    for members in ([1, 3], [FAILING]):
        group = dist.new_group(members)
        if dist.get_rank() in members:
            assert isinstance(group, dist.ProcessGroup)
            results.append(load([path], group=group))
    return results


def test_groups(ranks: Ranks, tmp_path: Path) -> None:
    first, second, third, fourth = ranks.run(WORLD, load_in_group, save(tmp_path, values()))
    assert first == []
    assert [result.received for (result,) in (second, third, fourth)] == [False, False, True]
    assert [len(result.failures) for (result,) in (second, third, fourth)] == [0, 0, 0]
    assert third[0].calls == ["all_reduce", "all_reduce"]


def load_as_it_is(path: Path) -> tuple[list[str], bool]:
    state = destinations()
    with CollectiveCounter() as counter:
        dcp_fast.load(state, checkpoint_id=path, share_metadata=True)
    return counter.calls, image(state) == image(values())


def test_small_files_are_read_by_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    calls = ["all_reduce"] * 3
    assert ranks.run(WORLD, load_as_it_is, save(tmp_path, values())) == [(calls, True)] * WORLD


# Metadata that is not shared


class Overriding(dcp_fast.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return super().read_metadata(*args, **kwargs)


def overriding_reader(path: Path) -> Any:
    return Overriding(path) if dist.get_rank() == FAILING else dcp_fast.FileSystemReader(path)


def torchs_reader(path: Path) -> Any:
    return dcp.FileSystemReader(path) if dist.get_rank() == FAILING else dcp_fast.FileSystemReader(path)


def trusting_reader(path: Path) -> Any:
    return dcp_fast.FileSystemReader(path, trust_metadata=dist.get_rank() == FAILING)


@pytest.mark.parametrize("reader", [overriding_reader, torchs_reader, trusting_reader])
def test_a_reader_of_another_kind(ranks: Ranks, tmp_path: Path, reader: Any) -> None:
    results = compare(ranks, [save(tmp_path, values())], None, reader)
    assert all(result.outcome() == ("", {}, image(values())) for result in results)
    assert received(results) == NOBODY


def test_a_rank_that_sees_another_file(ranks: Ranks, tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", values()), save(tmp_path / "b", values(1))]
    assert (paths[0] / ".metadata").stat().st_size == (paths[1] / ".metadata").stat().st_size
    results = compare(ranks, paths)
    assert received(results) == NOBODY
    for rank, result in enumerate(results):
        assert result.outcome() == ("", {}, image(values(1 if rank == FAILING else 0)))


def test_a_copy_is_the_same_file(ranks: Ranks, tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", values()), tmp_path / "b"]
    shutil.copytree(*paths)
    results = compare(ranks, paths)
    assert received(results) == ALL_BUT_THE_FIRST
    assert results[FAILING].outcome() == ("", {}, image(values()))


def test_metadata_that_only_the_unpickler_reads(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path, values())
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    write(tmp_path, metadata)
    content = (tmp_path / ".metadata").read_bytes()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(pickle.loads(content), protocol=1))
    results = compare(ranks, [tmp_path])
    assert received(results) == NOBODY
    assert all(result.outcome() == ("", {}, image(values())) for result in results)
    assert all(result.calls.count("broadcast") < blocks_of(tmp_path) for result in results)  # storage data is not sent


def save_own(path: Path) -> None:
    writer = dcp.FileSystemWriter(path, sync_files=False)
    dcp.save(values(dist.get_rank()), storage_writer=writer, use_collectives=False)


def test_metadata_of_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(WORLD, save_own, tmp_path)
    results = compare(ranks, [tmp_path])
    assert [result.outcome() for result in results] == [("", {}, image(values(rank))) for rank in range(WORLD)]


# Failures


def test_missing_on_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", values()), tmp_path / "b"]
    paths[1].mkdir()
    results = compare(ranks, paths)
    assert all(result.failures.keys() == {FAILING} for result in results)
    assert "No such file" in results[0].failures[FAILING]


def damaged(path: Path) -> None:
    """Makes the middle of the metadata nonsense."""
    file = path / ".metadata"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\xff" * 64  # no opcodes, and no text
    file.write_bytes(content)


def test_damaged_everywhere(ranks: Ranks, tmp_path: Path) -> None:
    damaged(save(tmp_path, values()))
    results = compare(ranks, [tmp_path])
    assert all(result.failures.keys() == set(range(WORLD)) for result in results)
    assert all(failure.startswith("CorruptMetadataError") for failure in results[0].failures.values())
    assert all(result.calls.count("broadcast") <= blocks_of(tmp_path) for result in results)  # the parser looks ahead


def in_first_position(path: Path) -> Any:
    """A reader of the damaged copy on the rank that parses."""
    return dcp_fast.FileSystemReader(path.with_name("b") if dist.get_rank() == 0 else path)


def test_damaged_where_it_is_parsed(ranks: Ranks, tmp_path: Path) -> None:
    path = save(tmp_path / "a", values())
    # Many more names between the ends of the file, which are the same.
    metadata = dcp.FileSystemReader(path).read_metadata()
    metadata.planner_data = {**metadata.planner_data, **{f"more.{i}": ("more", i) for i in range(1000)}}
    write(path, metadata)
    shutil.copytree(path, tmp_path / "b")
    damaged(tmp_path / "b")
    results = compare(ranks, [path], None, in_first_position)
    assert all(result.failures.keys() == {0} and "broadcast" in result.calls for result in results)
    assert results[FAILING].failures[0].startswith("CorruptMetadataError")


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def failing_midway(size: int, next_block: Callable[[], Any], path: str) -> Any:
    """In place of parse_blocks()."""
    for _ in range(2):
        assert len(next_block()) == BLOCK_BYTES
    raise MemoryError("injected")


def parsing_damage(size: int, next_block: Callable[[], Any], path: str) -> Any:
    """Likewise: parses blocks that have changed on their way."""
    return parse_blocks(size, lambda: next_block().tobytes().translate(bytes(range(1, 256)) + b"\0"), path)


def failing_read(broadcast: Any) -> Iterator[int]:
    """In place of _Broadcast._stored_blocks()."""
    yield BLOCK_BYTES
    raise OSError("injected")


def short_read(broadcast: Any) -> Iterator[int]:
    """Likewise, of a file that is being cut."""
    yield BLOCK_BYTES
    yield 1


struck: list[bool] = []


@dataclass(frozen=True)
class Fault:
    """Something that fails on one rank."""

    rank: int
    stage: str

    def __call__(self, faults: ExitStack) -> None:
        if dist.get_rank() != self.rank:
            return
        if self.stage == "interrupted":
            self.patch(faults, shared_metadata, "parse_blocks", failing(KeyboardInterrupt("injected")))
        elif self.stage == "interrupted before":
            self.patch(faults, shared_metadata, "_Broadcast", failing(KeyboardInterrupt("injected")))
        elif self.stage == "interrupted between blocks":
            signal.signal(signal.SIGINT, signal.default_int_handler)
            struck.clear()
            broadcast = shared_metadata._Broadcast._broadcast
            self.patch(faults, shared_metadata._Broadcast, "_broadcast", lambda *args: self.strike(broadcast(*args)))
        elif self.stage == "native":
            self.patch(faults, _native, "parse_blocks", failing(MemoryError("injected")))
        elif self.stage in ("failing_midway", "parsing_damage"):
            self.patch(faults, shared_metadata, "parse_blocks", globals()[self.stage])
        elif self.stage in ("failing_read", "short_read"):
            self.patch(faults, shared_metadata._Broadcast, "_stored_blocks", globals()[self.stage])
        else:
            self.patch(faults, shared_metadata, self.stage, failing(MemoryError("injected")))

    @staticmethod
    def strike(result: None) -> None:
        # Once: a second Ctrl-C does not wait.
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler and not struck:
            struck.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    @staticmethod
    def patch(faults: ExitStack, owner: Any, name: str, value: Any) -> None:
        faults.enter_context(mock.patch.object(owner, name, value))


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(0, stage) for stage in ("parse_blocks", "native", "failing_midway", "make_metadata")),
        *(Fault(FAILING, stage) for stage in ("parse_blocks", "native", "failing_midway", "make_metadata")),
    ],
    ids=str,
)
def test_a_failure_reaches_all_ranks(ranks: Ranks, tmp_path: Path, fault: Fault) -> None:
    results = ranks.run(WORLD, load, [save(tmp_path, values())], True, None, None, fault)
    for result in results:
        assert result.step == "plan"
        assert result.failures.keys() == {fault.rank}
        assert "injected" in result.failures[fault.rank]
        assert result.state == image(destinations())


@pytest.mark.parametrize(
    "fault",
    [
        Fault(0, "interrupted"),
        Fault(FAILING, "interrupted before"),
        Fault(0, "interrupted between blocks"),
        Fault(FAILING, "interrupted between blocks"),
    ],
    ids=str,
)
def test_an_interrupt_reaches_all_ranks(ranks: Ranks, tmp_path: Path, fault: Fault) -> None:
    results = ranks.run(WORLD, load, [save(tmp_path, values())], True, None, None, fault)
    for result in results:
        assert result.failures.keys() == {fault.rank}
        assert result.failures[fault.rank].startswith("KeyboardInterrupt: ")


@pytest.mark.parametrize("rank", [0, FAILING])
def test_without_memory_for_a_block_each_reads_its_own(ranks: Ranks, tmp_path: Path, rank: int) -> None:
    fault = Fault(rank, "bytearray")
    results = ranks.run(WORLD, load, [save(tmp_path, values())], True, None, None, fault)
    assert received(results) == NOBODY
    assert all(result.outcome() == ("", {}, image(values())) for result in results)


@pytest.mark.parametrize("stage", ["failing_read", "short_read"])
def test_a_file_that_cannot_be_sent_is_read_by_each_rank(ranks: Ranks, tmp_path: Path, stage: str) -> None:
    results = ranks.run(WORLD, load, [save(tmp_path, values())], True, None, None, Fault(0, stage))
    assert received(results) == NOBODY
    assert all(result.outcome() == ("", {}, image(values())) for result in results)


def test_a_rank_that_gets_damaged_blocks_reads_its_own_file(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(WORLD, load, [save(tmp_path, values())], True, None, None, Fault(FAILING, "parsing_damage"))
    assert received(results) == [False, True, False, True]
    assert all(result.outcome() == ("", {}, image(values())) for result in results)
    assert all(result.calls.count("broadcast") == blocks_of(tmp_path) for result in results)
