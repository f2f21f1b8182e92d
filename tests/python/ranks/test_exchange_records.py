"""Records that come whole, and for which the exchange has no memory at once: they arrive batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import torch_load, torch_reader
from ranks import Ranks
from shared_reads import failing_step, failure_of, load_by_torch, load_shared
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast
from dcp_fast.transfer.shared_records import SharedRecords, batches_of_records

WORLD = 3
FAILING = 1
SHAPE = (700, 400)  # of a record that does not fit into half of the exchange
TWO_OF_THEM = (3000, 500)  # of one that does not fit into all of it


def quantized(shape: tuple[int, int], *, filled: bool) -> torch.Tensor:
    """A tensor that only torch can read."""
    return torch.quantize_per_tensor(torch.rand(shape) if filled else torch.zeros(shape), 0.01, 0, torch.qint8)


def state(*, filled: bool) -> dict[str, Any]:
    torch.manual_seed(3)
    of_torch = {f"quantized {i}": quantized(SHAPE if i != 2 else TWO_OF_THEM, filled=filled) for i in range(5)}
    entries = {
        f"entry {i}": (torch.rand(SHAPE), "text") if filled else None for i in range(3)
    }  # what is no tensor itself is a bytes entry
    plain = {f"text {i}": f"{i}" * 300_000 if filled else "" for i in range(6)}
    small = {f"number {i}": i if filled else -1 for i in range(50)}
    tensors = {f"tensor {i}": torch.rand(333, 100) if filled else torch.zeros(333, 100) for i in range(9)}
    converted = {"to complex": torch.rand(200, 200) if filled else torch.zeros(200, 200, dtype=torch.complex64)}
    return {**of_torch, **entries, **plain, **small, **tensors, **converted}


def values(of: dict[str, Any]) -> dict[str, Any]:
    def comparable(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.int_repr() if value.is_quantized else value).numpy().tobytes()
        return [comparable(part) for part in value] if isinstance(value, tuple) else value

    return {name: comparable(value) for name, value in of.items()}


def save(path: Path) -> None:
    if dist.get_rank() == 0:
        dcp.save(state(filled=True), checkpoint_id=path, no_dist=True)
    dist.barrier()


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
        if item.dest_index.fqn == "tensor 4":
            self.state_dict["tensor 7"].fill_(3)


class Resolving(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.last = super().resolve_tensor(item)
        return self.last

    def load_bytes(self, item: ReadItem, value: Any) -> None:
        super().load_bytes(item, value)


def load(path: Path, planner: Callable[[], Any], names: Sequence[str] | None) -> tuple[int, str, int]:
    expected, loaded = ({n: v for n, v in state(filled=False).items() if names is None or n in names} for _ in "ab")
    load_by_torch(expected, path, planner())
    report = load_shared(loaded, path, planner=planner())
    assert values(loaded) == values(expected)
    return report.bytes_read, report.sharing_fallback_reason, report.fallback_records


@pytest.mark.parametrize("planner", [type(None), dcp_fast.DefaultLoadPlanner, Committing, Resolving])
def test_records_are_read_once(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    results = ranks.run(WORLD, load, checkpoint, planner, None)
    assert all((reason, records) == ("", 5) for _, reason, records in results)
    # Records of tensors are read once more without their payload: 9 of these are small enough to come with headers.
    assert sum(read for read, *_ in results) <= 1.02 * stored_bytes(checkpoint)


def test_windows_that_end(ranks: Ranks, checkpoint: Path) -> None:
    results = ranks.run(WORLD, load, checkpoint, Changing, None)
    assert all(records == 5 for *_, records in results)


def load_some(path: Path, planner: Callable[[], Any]) -> tuple[int, str, int]:
    """Rank 0 needs everything, rank 1 half of it, rank 2 a tensor."""
    everything = list(state(filled=False))
    return load(path, planner, [everything, everything[1::2], ["tensor 3"]][dist.get_rank()])


@pytest.mark.parametrize("planner", [type(None), Committing, Resolving])
def test_ranks_that_need_other_records(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    results = ranks.run(WORLD, load_some, checkpoint, planner)
    assert [records for *_, records in results] == [5, 2, 0]
    assert all(reason == "" for _, reason, _ in results)


def load_tied(path: Path) -> str:
    """What comes last stays in memory that two records go to."""
    expected, loaded = ({"entry 1": None, "number 7": 0} for _ in "ab")
    for of in (expected, loaded):
        tensor = quantized(SHAPE, filled=False)
        of.update({"quantized 0": tensor, "quantized 3": tensor, "quantized 4": tensor})
    load_by_torch(expected, path)
    report = load_shared(loaded, path)
    assert values(loaded) == values(expected)
    return report.sharing_fallback_reason


def test_records_for_the_same_memory(ranks: Ranks, checkpoint: Path) -> None:
    assert ranks.run(WORLD, load_tied, checkpoint) == [""] * WORLD


def load_compressed(path: Path) -> tuple[int, str, int]:
    if dist.get_rank() == 0:
        stored = {f"t{i}": torch.rand(400, 400) for i in range(6)}
        dcp.save(stored, storage_writer=dcp.FileSystemWriter(path, _extensions=[ZStandard()]), no_dist=True)
    dist.barrier()
    expected, loaded = ({f"t{i}": torch.zeros(400, 400) for i in range(6)} for _ in "ab")
    torch_load(expected, storage_reader=torch_reader(path))
    report = load_shared(loaded, path)
    assert values(loaded) == values(expected)
    return report.bytes_read, report.sharing_fallback_reason, stored_bytes(path)


def test_compressed_records(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(WORLD, load_compressed, tmp_path / "zstd")
    assert all(reason == "" for _, reason, _ in results)
    assert sum(read for read, *_ in results) <= 1.02 * results[0][2]


def load_with_faults(path: Path, planner: Callable[[], Any]) -> list[dict[int, str] | str]:
    found: list[dict[int, str] | str] = []
    for nth in range(1000):
        with failing_step(nth, FAILING, RuntimeError):
            found.append(failure_of(partial(load_shared, state(filled=False), path, planner=planner())))
        if found[-1] == "nothing":
            return found
    return found


@pytest.mark.parametrize("planner", [type(None), Resolving])
def test_faults_at_every_step(ranks: Ranks, checkpoint: Path, planner: Callable[[], Any]) -> None:
    for *failures, last in ranks.run(WORLD, load_with_faults, checkpoint, planner):
        assert last == "nothing"
        assert len(failures) > 30
        assert all(failure == {FAILING: "RuntimeError"} for failure in failures)


def test_batches() -> None:
    lengths = {1: 5, 2: 5, 3: 1, 4: 30, 5: 0, 6: 2}
    assert list(batches_of_records([1, 2, 3, 2, 4, 5, 6, 1], lengths.__getitem__, 10)) == [[1, 2], [3], [4], [5, 6]]
    assert list(batches_of_records([], lengths.__getitem__, 10)) == []


def test_one_batch_is_in_memory() -> None:
    here: list[Sequence[int]] = []

    def fetch(batch: Sequence[int]) -> Callable[[], None] | None:
        assert not here
        if batch == [9]:
            raise KeyboardInterrupt
        here.append(batch)
        return here.clear

    records = SharedRecords([[1, 2], [3], [4, 5], [9]], fetch)
    assert len(records) == 4
    found = [(run, list(here)) for run in records.runs([7, 1, 2, 7, 4, 1, 5])]
    assert found == [([7], []), ([1, 2, 7], [[1, 2]]), ([4, 1, 5], [[4, 5]])]
    records.reach(3)  # is gone
    assert here == [[4, 5]]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            records.reach(9)
    assert not here
    records.close()
