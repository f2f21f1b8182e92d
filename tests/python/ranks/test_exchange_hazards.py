"""Loads that share reads in unusual surroundings: nobody waits in vain, and nobody gets what is not his."""

from __future__ import annotations

import os
import shutil
import signal
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import torch_load, torch_reader
from quantized_files import FLOAT8, fast_quantized_reader, finite, write_quantized
from ranks import Ranks
from shared_reads import ROUNDS_BYTES, failing_step, failure_of, load_shared, save_by_rows, state_dict, values_of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

import dcp_fast
from dcp_fast.ranks import round_memory, steps
from dcp_fast.ranks.exchange import Exchange
from dcp_fast.ranks.round_memory import RoundMemory

WORLD = 3
FAILING = 1
LAYOUT = "replicas"


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hazards") / "checkpoint"
    ranks.run(WORLD, save_by_rows, path)
    return path


def load_as_torch(path: Path, **options: Any) -> dcp_fast.LoadReport:
    expected, state = state_dict(LAYOUT), state_dict(LAYOUT)
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path, **options)
    assert values_of(state) == values_of(expected)
    return report


class Resolving(dcp_fast.DefaultLoadPlanner):
    """Has its boxes arrive in batches."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item)


def load_elsewhere(path: Path, on: list[int]) -> None:
    state, expected = {"plain": torch.zeros(51, 9)}, {"plain": torch.zeros(51, 9)}
    torch_load(expected, storage_reader=torch_reader(path))
    for planner in (dcp_fast.DefaultLoadPlanner(), Resolving()):
        state["plain"].zero_()
        with torch.device("meta") if dist.get_rank() in on else nullcontext():
            report = load_shared(state, path, planner=planner)
        assert values_of(state) == values_of(expected)
        assert (report.sharing_fallback_reason, report.exchange_rounds > 0) == ("", True)


@pytest.mark.parametrize("on", [[0, 1, 2], [1]])
def test_another_default_device(ranks: Ranks, checkpoint: Path, on: list[int]) -> None:
    ranks.run(WORLD, load_elsewhere, checkpoint, on, timeout=60)


def fail_to_pack(path: Path, at: int) -> dict[int, str] | str:
    original, calls = RoundMemory.pack_headers, iter(range(1_000_000))

    def pack_headers(self: RoundMemory, *args: Any) -> int:
        if dist.get_rank() == FAILING and next(calls) == at:
            raise MemoryError
        return original(self, *args)

    with mock.patch.object(RoundMemory, "pack_headers", pack_headers):
        failure = failure_of(partial(load_shared, state_dict(LAYOUT), path))
    load_as_torch(path)  # the group can be used again
    return failure


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_round_that_cannot_be_packed(ranks: Ranks, checkpoint: Path, at: int) -> None:
    """All others learn of it in that very round."""
    assert ranks.run(WORLD, fail_to_pack, checkpoint, at, timeout=60) == [{FAILING: "OutOfMemoryError"}] * WORLD


def strike_in(path: Path, owner: type, method: str, planner: type[dcp_fast.DefaultLoadPlanner]) -> dict[int, str] | str:
    """Ctrl-C on one rank before a method runs there."""
    original = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == FAILING:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with mock.patch.object(owner, method, call):
        failure = failure_of(partial(load_shared, state_dict(LAYOUT), path, planner=planner()))
    load_as_torch(path)
    return failure


class Fails(dcp_fast.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        if dist.get_rank() == FAILING:
            raise ArithmeticError("a planner that fails")
        return super().resolve_tensor(read_item)


@pytest.mark.parametrize(
    ("owner", "method", "planner", "error"),
    [
        (Exchange, "__init__", dcp_fast.DefaultLoadPlanner, "KeyboardInterrupt"),
        (steps._ShareReads, "agree", dcp_fast.DefaultLoadPlanner, "KeyboardInterrupt"),
        (steps._ShareReads, "read", dcp_fast.DefaultLoadPlanner, "KeyboardInterrupt"),
        (Exchange, "leave", Fails, "ArithmeticError"),
    ],
)
def test_an_interrupt_between_steps(
    ranks: Ranks, checkpoint: Path, owner: type, method: str, planner: type, error: str
) -> None:
    failures = ranks.run(WORLD, strike_in, checkpoint, owner, method, planner, timeout=60)
    assert failures == [{FAILING: error}] * WORLD


class LoadsByTorch(dcp_fast.DefaultLoadPlanner):
    """Loads something else by torch's function, and by this package's reader."""

    def __init__(self, other: Path, on: list[int]) -> None:
        super().__init__()
        self._path = other if dist.get_rank() in on else None
        self.other = torch.zeros(51, 9)

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        if self._path is not None:
            dcp.load({"plain": self.other}, storage_reader=dcp_fast.FileSystemReader(self._path), no_dist=True)
        return super().finish_plan(central_plan)


def load_with_another(path: Path, other: Path, on: list[int]) -> None:
    planner = LoadsByTorch(other, on)
    report = load_as_torch(path, planner=planner)
    assert report.sharing_fallback_reason == ""
    if dist.get_rank() in on:
        expected = torch.zeros(51, 9)
        dcp.load({"plain": expected}, storage_reader=torch_reader(other), no_dist=True)
        assert values_of([planner.other]) == values_of([expected])


@pytest.mark.parametrize("on", [[1], [0, 1, 2]])
def test_loads_of_torch_within_loads(ranks: Ranks, checkpoint: Path, tmp_path: Path, on: list[int]) -> None:
    """Another checkpoint is no other one by names, sizes and times of its files."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)  # keeps times
    for file in other.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        found = content.find(b"\0\0\x80?")  # 1.0 in a payload
        while found >= 0:
            content[found + 2 : found + 4] = b"\0@"  # 2.0
            found = content.find(b"\0\0\x80?", found)
        times = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    ranks.run(WORLD, load_with_another, checkpoint, other, on, timeout=60)


class Unsure(dcp.FileSystemReader):
    """Cannot be asked for its transforms on one rank."""

    @property
    def transforms(self) -> Any:
        if dist.get_rank() == FAILING:
            raise OSError("they are out of reach")
        return self._transforms

    @transforms.setter
    def transforms(self, value: Any) -> None:
        self._transforms = value


def load_unsure(path: Path, share: bool) -> dict[int, str] | str:
    state = state_dict(LAYOUT)
    return failure_of(partial(dcp_fast.load, state, storage_reader=Unsure(path), share_reads=share))


def test_a_reader_that_cannot_be_looked_at(ranks: Ranks, checkpoint: Path) -> None:
    alone, shared = (ranks.run(WORLD, load_unsure, checkpoint, share, timeout=60) for share in (False, True))
    assert alone == shared == [{FAILING: "OSError"}] * WORLD


class Rings:
    """Counts the memory for rounds that is there."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        self.most = 0
        self._allocate = round_memory._on_host

    def allocate(self, size: int, device: torch.device) -> torch.Tensor:
        memory = self._allocate(size, device)
        self.alive[id(memory)] = memory.nbytes
        weakref.finalize(memory, self.alive.pop, id(memory), None)
        self.most = max(self.most, sum(self.alive.values()))
        return memory


def hold_rings(path: Path) -> tuple[int, int]:
    """The most memory for rounds in a load of many exchanges; and what is left while a load's error is held."""
    rings = Rings()
    with mock.patch.object(round_memory, "_on_host", rings.allocate):
        report = load_as_torch(path, planner=Resolving())
        assert report.exchange_rounds > 0
        with pytest.raises(CheckpointException) as caught, failing_step(4, FAILING, RuntimeError):
            load_shared(state_dict(LAYOUT), path)
        assert caught.value.failures.keys() == {FAILING}
        return rings.most, sum(rings.alive.values())


def test_memory_for_rounds(ranks: Ranks, checkpoint: Path) -> None:
    for most, left in ranks.run(WORLD, hold_rings, checkpoint):
        assert ROUNDS_BYTES / 4 < most <= ROUNDS_BYTES
        assert left == 0


def reason_with_quantized(path: Path) -> str:
    """Of tensors that share one destination, beside one that is quantized."""
    if dist.get_rank() == 0:
        plain = {f"plain{number}": torch.full((5000,), float(number)) for number in range(4)}
        write_quantized(path, {"q": finite((64, 64), FLOAT8[0], 1, 100.0), "q_scale_inv": torch.rand(2, 2), **plain})
    dist.barrier()
    target = torch.zeros(5000)
    state = {"q": torch.zeros(64, 64), **{f"plain{number}": target for number in range(4)}}
    reader = fast_quantized_reader(str(path), target_dtype=torch.float32, block_size=32)
    report = load_shared(state, path, storage_reader=reader)
    assert torch.equal(target, torch.full((5000,), 3.0))
    return report.sharing_fallback_reason


def reason_of_aliases(path: Path, count: int = 40) -> tuple[str, int]:
    """Of many tensors that share one destination on one rank."""
    if dist.get_rank() == 0:
        dcp.save(
            {f"t{number:02}": torch.full((500,), float(number)) for number in range(count)},
            checkpoint_id=path,
            no_dist=True,
        )
    dist.barrier()
    target = torch.zeros(500)
    state = {f"t{number:02}": target if dist.get_rank() == 0 else torch.zeros(500) for number in range(count)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    report = load_shared(state, path)
    torch_load(expected, storage_reader=torch_reader(path))
    if dist.get_rank() > 0:
        assert values_of(state) == values_of(expected)
    else:
        assert torch.equal(target, torch.full((500,), count - 1.0))
    return report.sharing_fallback_reason, report.exchange_rounds


def test_aliases_by_the_dozen(ranks: Ranks, tmp_path: Path) -> None:
    """Ranks share some of them: an exchange for each would take longer than all reads."""
    (reason, rounds), *others = ranks.run(WORLD, reason_of_aliases, tmp_path)
    assert "written over others" in reason
    assert rounds < 40
    assert [reason for reason, _ in others] == [""] * (WORLD - 1)


def test_aliases_beside_quantized_tensors(ranks: Ranks, tmp_path: Path) -> None:
    for reason in ranks.run(WORLD, reason_with_quantized, tmp_path):
        assert "written over others" in reason


def load_many_headers(path: Path) -> str:
    """Of which there are more than the exchange has memory for."""
    names = [f"t{number}" for number in range(700)]
    if dist.get_rank() == 0:
        dcp.save({name: torch.full((700,), i) for i, name in enumerate(names)}, checkpoint_id=path, no_dist=True)
    dist.barrier()
    expected, state = ({name: torch.zeros(700, dtype=torch.int64) for name in names} for _ in "ab")
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(state, path)
    assert values_of(state) == values_of(expected)
    return report.sharing_fallback_reason


def test_headers_that_do_not_fit(ranks: Ranks, tmp_path: Path) -> None:
    for reason in ranks.run(WORLD, load_many_headers, tmp_path):
        assert "bytes of headers do not fit into exchange_bytes" in reason
