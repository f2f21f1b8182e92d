"""Irregular callers: mappings that make entries on the fly, odd items, odd chunks, another default device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import fast_error
from helpers import (
    Entry,
    assert_same_load,
    fast_reader,
    fill,
    image,
    load_with,
    save,
    torch_load,
    torch_reader,
    write_checkpoint,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

import dcp_fast
from dcp_fast import _native

FLOAT = torch.float32


class MadeOnTheFly(dict[MetadataIndex, _StorageInfo]):
    """Storage data that keeps no object per entry, so that addresses of such objects are reused."""

    def __getitem__(self, index: MetadataIndex) -> _StorageInfo:
        info = super().__getitem__(index)
        return _StorageInfo(info.relative_path, info.offset, info.length)


def test_storage_data_may_be_made_on_the_fly(tmp_path: Path) -> None:
    save(tmp_path, {f"x{i}": torch.full((10,), float(i)) for i in range(50)})

    class Reader(dcp_fast.FileSystemReader):
        def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
            super().set_up_storage_reader(*args, **kwargs)
            self.storage_data = MadeOnTheFly(self.storage_data)

    state = {f"x{i}": torch.zeros(10) for i in range(50)}
    dcp.load(state, storage_reader=Reader(tmp_path))
    for i in range(50):
        assert (state[f"x{i}"] == i).all()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_default_device(tmp_path: Path, threads: int, dtype: torch.dtype) -> None:
    save(tmp_path, {"t": torch.arange(100_000.0)})
    state = {"t": torch.zeros(100_000, dtype=dtype)}
    with torch.device("meta"):
        dcp_fast.load(state, storage_reader=fast_reader(tmp_path, threads=threads))
    assert torch.equal(state["t"], torch.arange(100_000, dtype=dtype))


class FixedPlan(dcp.DefaultLoadPlanner):
    """Plans one item of tensor "t": rows 1 and 2 of the stored tensor go to the first two of the destination."""

    def __init__(self, storage: tuple[int, ...], dest: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.box = (storage, dest, lengths)

    def create_local_plan(self) -> LoadPlan:
        index = MetadataIndex("t", torch.Size([0, 0]), 0)
        storage, dest, lengths = map(torch.Size, self.box)
        return LoadPlan([ReadItem(LoadItemType.TENSOR, index, dest, index, storage, lengths)])


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize(
    "box",
    [((1, 0), (0, 0), (2,)), ((1,), (0,), (2, 4)), ((1,), (0,), (2,)), ((1, 0), (0, 0, 0), (2,))],
    ids=["long offsets", "short offsets", "rows only", "too many offsets"],
)
def test_items_of_uneven_dimensions(tmp_path: Path, box: tuple[tuple[int, ...], ...], hooks: bool) -> None:
    save(tmp_path, {"t": fill((3, 4), FLOAT)})

    class Hooked(FixedPlan):
        def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
            return super().resolve_tensor(read_item)

    planner = Hooked if hooks else FixedPlan
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(3, 4)}, planner=lambda: planner(*box))


def test_an_item_whose_offsets_disagree_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((3, 4), FLOAT)})
    planner = FixedPlan((1, 0), (0,), (2, 4))
    outcome = load_with(dcp_fast.load, {"t": torch.zeros(3, 4)}, storage_reader=fast_reader(tmp_path), planner=planner)
    assert outcome.errors is not None
    error = outcome.errors[0]
    assert isinstance(error, dcp_fast.SizeMismatchError)
    assert error.fqn == "t"


def chunk(*pairs: tuple[int, int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(at for at, _ in pairs), torch.Size(size for _, size in pairs))


@pytest.mark.parametrize("ragged_side", ["stored", "wanted"])
def test_chunks_of_other_dimensions_are_not_misread(ragged_side: str) -> None:
    # Together these have as many numbers as two chunks of two dimensions.
    ragged = [chunk((0, 4)), chunk((0, 4), (0, 4), (0, 4))]
    uneven = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4])), chunk((0, 4), (0, 4), (0, 4))]
    whole = [chunk((0, 4), (0, 4))]
    for odd in (ragged, uneven):
        stored, wanted = (odd, whole) if ragged_side == "stored" else (whole, odd)
        entry = TensorStorageMetadata(TensorProperties(dtype=FLOAT), torch.Size([4, 4]), stored)
        outcomes = []
        for search in (create_read_items_for_chunk_list, dcp_fast.create_read_items_for_chunk_list):
            try:
                outcomes.append(repr(search("t", entry, wanted)))
            except Exception as error:
                outcomes.append(type(error).__name__)
        assert outcomes[1] == outcomes[0]


class LastWord(dcp.DefaultLoadPlanner):
    """Writes to a tensor when a value comes, so that it matters which of the two comes first."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        super().load_bytes(read_item, value)
        self.state_dict["b"].fill_(-1)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "c")])
def test_load_bytes_is_called_in_torchs_order(tmp_path: Path, names: tuple[str, str]) -> None:
    values = {"a": 5, "b": torch.ones(3), "c": 6}
    write_checkpoint(
        tmp_path, {n: Entry.of(v) if n == "b" else Entry(value=v) for n, v in values.items() if n in names}
    )

    def make() -> dict[str, Any]:
        return {name: torch.zeros(3) if name == "b" else 0 for name in names}

    assert_same_load(tmp_path, make, planner=LastWord)


class Remover:
    """A Stateful whose state dict takes another key of the surrounding one away."""

    def __init__(self, surrounding: dict[str, Any], when: str) -> None:
        self.surrounding, self.when, self.w = surrounding, when, torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        if self.when == "before":
            self.surrounding.pop("b", None)
        return {"w": self.w}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.surrounding.pop("b", None)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stateful_may_remove_other_keys(tmp_path: Path, when: str) -> None:
    save(tmp_path, {"a": {"w": torch.ones(3)}, "b": torch.ones(3)})
    images = []
    for load, reader in ((torch_load, torch_reader), (dcp_fast.load, fast_reader)):
        state: dict[str, Any] = {"b": torch.zeros(3)}
        state["a"] = Remover(state, when)
        load(state, storage_reader=reader(tmp_path))
        images.append((image(state["a"].w), sorted(state)))
    assert images[1] == images[0]
    assert images[0][1] == ["a"]


def test_autograd_notices_a_load_that_failed_midway(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(1 << 20), "b": torch.ones(1 << 20)})

    def load(nth: int, weight: torch.Tensor) -> int:
        state = {"a": weight, "b": torch.zeros(1 << 20)}
        with _native.FaultInjection("pread", nth=nth, error_number=5) as faults:
            error = fast_error(tmp_path, state, threads=1, io="cached")
        assert (error is not None) == (nth >= 0)
        return faults.calls

    calls = load(-1, torch.zeros(1 << 20))
    weight = torch.zeros(1 << 20, requires_grad=True)
    loss = (weight * weight).sum()
    load(calls - 1, weight)
    assert (weight == 1).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
