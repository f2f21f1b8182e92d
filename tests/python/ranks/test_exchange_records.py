"""Records that come whole, and for which the exchange has no memory at once: they arrive batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from shared_reads import failing_step, failure_of, load_by_torch, load_shared
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast
from dcp_fast import _native
from dcp_fast.transfer.shared_records import SharedRecords, batches_of_records

WORLD = 3
FAILING = 1
SHAPE = (700, 400)  # of a record that does not fit into half of the exchange
LARGER = (3000, 500)  # of one that does not fit into all of it


def quantized(shape: tuple[int, int], *, filled: bool) -> torch.Tensor:
    """A tensor that only torch can read."""
    return torch.quantize_per_tensor(torch.rand(shape) if filled else torch.zeros(shape), 0.01, 0, torch.qint8)


def state(*, filled: bool) -> dict[str, Any]:
    """Small and large ones of each kind beside each other."""
    torch.manual_seed(3)
    found: dict[str, Any] = {}
    for i in range(6):
        # What is no tensor itself is a bytes entry: this one is more than a plain value.
        found[f"entry {i}"] = (torch.rand(SHAPE), "text") if filled else None
        found[f"quantized {i}"] = quantized(SHAPE if i != 2 else LARGER, filled=filled)
        found[f"tensor {i}"] = torch.rand(333, 100) if filled else torch.zeros(333, 100)
        for j in range(3):
            found[f"text {i} {j}"] = f"{i}" * 200_000 if filled else ""
            found[f"short {i} {j}"] = f"{i} {j}" * 700 if filled else ""
    found["to complex"] = torch.rand(200, 200) if filled else torch.zeros(200, 200, dtype=torch.complex64)
    return found


def values(of: dict[str, Any]) -> dict[str, Any]:
    def comparable(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.int_repr() if value.is_quantized else value).numpy().tobytes()
        return [comparable(part) for part in value] if isinstance(value, tuple) else value

    return {name: comparable(value) for name, value in of.items()}


def save(path: Path) -> None:
    """Each rank saves some."""
    everything = list(state(filled=True).items())
    dcp.save(dict(everything[dist.get_rank() :: WORLD]), checkpoint_id=path)


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.distcp"))


@pytest.fixture(scope="module")
def checkpoint(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "checkpoint"
    ranks.run(WORLD, save, path)
    return path


class Committing(dcp.DefaultLoadPlanner):
    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor is not None


class Changing(dcp.DefaultLoadPlanner):
    """Changes a tensor that is read later, so that windows end."""

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if item.dest_index.fqn == "tensor 1":
            self.state_dict["tensor 4"].fill_(3)


class Resolving(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.last = super().resolve_tensor(item)
        return self.last

    def load_bytes(self, item: ReadItem, value: Any) -> None:
        super().load_bytes(item, value)


class Batches:
    """Counts batches, and how many are in memory at once."""

    def __init__(self) -> None:
        self.here = self.most = self.all = 0
        keep, drop = _native.keep, _native.drop

        def counted_keep(layouts: Any, need: Any) -> None:
            self.here, self.all = self.here + 1, self.all + 1
            self.most = max(self.most, self.here)
            keep(layouts, need)

        def counted_drop(layouts: Any, need: Any) -> None:
            self.here -= 1
            drop(layouts, need)

        self.counted = mock.patch.multiple(_native, keep=counted_keep, drop=counted_drop)


class Found(NamedTuple):
    bytes_read: int
    reason: str
    fallback_records: int
    batches: int


def load(path: Path, planner: Callable[[], Any], wanted: Callable[[], dict[str, Any]]) -> Found:
    expected, loaded = wanted(), wanted()
    load_by_torch(expected, path, planner())
    batches = Batches()
    with batches.counted:
        report = load_shared(loaded, path, planner=planner())
    assert values(loaded) == values(expected)
    assert batches.here == 1  # the first exchange is kept
    assert batches.most <= 3
    return Found(report.bytes_read, report.sharing_fallback_reason, report.fallback_records, batches.all - 1)


def everything() -> dict[str, Any]:
    return state(filled=False)


def backwards() -> dict[str, Any]:
    return dict(reversed(state(filled=False).items()))


PLANNERS = [type(None), dcp_fast.DefaultLoadPlanner, Committing, Resolving]


@pytest.mark.parametrize("wanted", [everything, backwards])
@pytest.mark.parametrize("planner", PLANNERS)
def test_records_are_read_once(
    ranks: Ranks, checkpoint: Path, planner: Callable[[], Any], wanted: Callable[[], dict[str, Any]]
) -> None:
    results = ranks.run(WORLD, load, checkpoint, planner, wanted)
    assert all((found.reason, found.fallback_records) == ("", 6) for found in results)
    assert all(found.batches > 8 for found in results)
    # What comes with headers is read once more, if it is a tensor.
    assert sum(found.bytes_read for found in results) <= 1.02 * stored_bytes(checkpoint)


def large_ones() -> dict[str, Any]:
    return {name: value for name, value in state(filled=False).items() if not name.startswith("short")}


@pytest.mark.parametrize("planner", PLANNERS)
def test_gaps_between_records(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    """Short ones lie between others, and nobody wants them."""
    results = ranks.run(WORLD, load, checkpoint, planner, large_ones)
    assert all(found.reason == "" for found in results)
    assert sum(found.bytes_read for found in results) <= 1.05 * stored_bytes(checkpoint)


def test_windows_that_end(ranks: Ranks, checkpoint: Path) -> None:
    results = ranks.run(WORLD, load, checkpoint, Changing, everything)
    assert all(found.fallback_records == 6 for found in results)
    assert all("read again" in found.reason for found in results)


def some() -> dict[str, Any]:
    """Rank 0 needs everything, rank 1 half of it, rank 2 a tensor."""
    whole = list(everything().items())
    return dict([whole, whole[1::2], whole[2:3]][dist.get_rank()])


@pytest.mark.parametrize("planner", [type(None), Committing, Resolving])
def test_ranks_that_need_other_records(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    results = ranks.run(WORLD, load, checkpoint, planner, some)
    assert [found.fallback_records for found in results] == [6, 3, 0]
    assert all(found.reason == "" for found in results)
    # Those of rank 1 come in other batches than they do on rank 0, and are read twice then; but not all of them.
    assert sum(found.bytes_read for found in results) < 1.6 * stored_bytes(checkpoint)


def first_ones() -> dict[str, Any]:
    """The same on ranks 0 and 1; rank 2 needs what is between."""
    whole = list(everything().items())
    return dict(whole[len(whole) // 2 :] if dist.get_rank() < 2 else whole[1:9])


@pytest.mark.parametrize("planner", [type(None), Committing, Resolving])
def test_replicas_beside_others(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    results = ranks.run(WORLD, load, checkpoint, planner, first_ones)
    assert all(found.reason == "" for found in results)
    assert results[0].bytes_read + results[1].bytes_read < 0.7 * stored_bytes(checkpoint)


def tied() -> dict[str, Any]:
    """What comes last stays in memory that several records go to."""
    of_torch, of_engine = quantized(SHAPE, filled=False), torch.zeros(333, 100)
    tensors = {f"quantized {i}": of_torch for i in (0, 3, 4)} | {f"tensor {i}": of_engine for i in (1, 5)}
    return {**everything(), **tensors}


@pytest.mark.parametrize("planner", PLANNERS)
def test_records_for_the_same_memory(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    results = ranks.run(WORLD, load, checkpoint, planner, tied)
    assert all((found.reason, found.fallback_records) == ("", 6) for found in results)
    assert sum(found.bytes_read for found in results) <= 1.02 * stored_bytes(checkpoint)


def save_compressed(path: Path) -> None:
    if dist.get_rank() == 0:
        stored = {f"t{i}": torch.rand(300, 250) for i in range(24)}
        dcp.save(stored, storage_writer=dcp.FileSystemWriter(path, _extensions=[ZStandard()]), no_dist=True)
    dist.barrier()


def compressed(*, order: int, tied: bool) -> dict[str, Any]:
    found = {f"t{i}": torch.zeros(300, 250) for i in range(24)}
    if tied:
        found["t20"] = found["t3"]
    return dict(list(found.items())[::order])


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("planner", [type(None), Committing, Resolving])
def test_compressed_records(
    ranks: Ranks, tmp_path: Path, planner: Callable[[], Any], order: int, is_tied: bool
) -> None:
    ranks.run(WORLD, save_compressed, tmp_path / "zstd")
    results = ranks.run(WORLD, load, tmp_path / "zstd", planner, partial(compressed, order=order, tied=is_tied))
    assert all(found.reason == "" for found in results)
    assert sum(found.bytes_read for found in results) <= 1.02 * stored_bytes(tmp_path / "zstd")


def load_with_faults(
    path: Path, planner: Callable[[], Any], wanted: Callable[[], dict[str, Any]]
) -> list[dict[int, str] | str]:
    found: list[dict[int, str] | str] = []
    for nth in range(1000):
        with failing_step(nth, FAILING, ZeroDivisionError):
            found.append(failure_of(partial(load_shared, wanted(), path, planner=planner())))
        if found[-1] == "nothing":
            return found
    return found


def few() -> dict[str, Any]:
    return {name: value for name, value in tied().items() if name[-1] in "035"}


@pytest.mark.parametrize("planner", [type(None), Committing, Resolving])
def test_faults_at_every_step(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    for *failures, last in ranks.run(WORLD, load_with_faults, checkpoint, planner, few):
        assert last == "nothing"
        assert len(failures) > 30
        assert all(failure == {FAILING: "ZeroDivisionError"} for failure in failures)


def load_with_little_memory(path: Path) -> tuple[dict[int, str] | str, list[str]]:
    said = []

    def lack(layouts: Any, records: Sequence[int], names: Sequence[str]) -> Any:
        if dist.get_rank() == FAILING:
            raise MemoryError
        return of_records(layouts, records, names)

    of_records = _native.Need.of_records
    needs = SimpleNamespace(of_headers=_native.Need.of_headers, of_program=_native.Need.of_program, of_records=lack)
    with mock.patch.object(_native, "Need", needs):
        failure = failure_of(partial(load_shared, everything(), path))
    try:
        with mock.patch.object(_native, "Need", needs):
            load_shared(everything(), path)
    except CheckpointException as error:
        said = [str(error.failures[FAILING][0])]
    return failure, said


def test_memory_for_a_batch_is_short(ranks: Ranks, checkpoint: Path) -> None:
    for failure, said in ranks.run(WORLD, load_with_little_memory, checkpoint):
        assert failure == {FAILING: "OutOfMemoryError"}
        assert str(checkpoint) in said[0]


def test_batches() -> None:
    lengths = {1: 5, 2: 5, 3: 1, 4: 30, 5: 0, 6: 2}
    assert list(batches_of_records([1, 2, 3, 2, 4, 5, 6, 1], lengths.__getitem__, 20)) == [[1, 2], [3], [4], [5, 6]]
    assert list(batches_of_records([], lengths.__getitem__, 20)) == []


def test_two_batches_are_in_memory() -> None:
    here: list[Sequence[int]] = []
    noted: list[int] = []

    def fetch(batch: Sequence[int]) -> Callable[[], None] | None:
        assert len(here) < 2
        if batch == [9]:
            raise KeyboardInterrupt
        here.append(batch)
        return partial(here.remove, batch)

    records = SharedRecords([[1, 2], [3], [4, 5], [6], [9]], fetch, lambda: noted.append(1))
    assert len(records) == 5
    found = [(run, list(here)) for run in records.runs([7, 1, 7, 4, 3, 5])]
    # Of the first batch a record is unread when there must be room for the third one.
    assert found == [([7], []), ([1, 7], [[1, 2]]), ([4, 3, 5], [[3], [4, 5]])]
    assert not here
    assert not noted
    with records.reach(2):
        assert not here
    assert noted == [1]
    with records.reach(6):
        assert here == [[6]]
    assert not here
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), records.reach(9):
            pass
    records.close()
