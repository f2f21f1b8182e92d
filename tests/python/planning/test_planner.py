"""Planning: the same items in the same order as torch's, and planners of every kind with our reader."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import pickle
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import ShardedBuffer, fill, image
from metadata_cases import parse_metadata
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

import dcp_fast
from dcp_fast.planning.column_plan import ColumnPlan
from dcp_fast.planning.search import create_default_local_load_plan

torch_plan = default_planner.create_default_local_load_plan

Chunks = list[ChunkStorageMetadata]


def random_grid(rng: random.Random, size: list[int]) -> Chunks:
    """Chunks that partition a tensor, some of them empty where two cuts fall together."""
    chunks: list[tuple[list[int], list[int]]] = [([], [])]
    for length in size:
        edges = [0, *sorted(rng.randint(0, length) for _ in range(rng.randint(0, 3))), length]
        pieces = list(itertools.pairwise(edges))
        chunks = [([*at, a], [*sizes, b - a]) for at, sizes in chunks for a, b in pieces]
    return [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in chunks]


def random_boxes(rng: random.Random, size: list[int]) -> Chunks:
    """Any boxes: overlapping, with gaps, empty, now and then beyond the tensor."""
    chunks = []
    for _ in range(rng.randint(0, 8)):
        offsets = [rng.randint(0, length) for length in size]
        limits = [length - at + (rng.random() < 0.05) for length, at in zip(size, offsets, strict=True)]
        sizes = [rng.randint(0, limit) for limit in limits]
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return chunks


def random_chunks(rng: random.Random, size: list[int]) -> Chunks:
    chunks = random_grid(rng, size) if rng.random() < 0.5 else random_boxes(rng, size)
    if rng.random() < 0.3:
        chunks = rng.sample(chunks, rng.randint(0, len(chunks)))
    if rng.random() < 0.5:
        rng.shuffle(chunks)
    return chunks


def tensor_metadata(size: list[int], chunks: Chunks) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), chunks)


@pytest.mark.parametrize("dims", range(6))
def test_read_items_of_random_chunks(dims: int) -> None:
    found = 0
    for seed in range(700):
        rng = random.Random(f"{dims} {seed}")
        size = [rng.choice([0, 1, 2, 3, 7, 20]) for _ in range(dims)]
        metadata = tensor_metadata(size, random_chunks(rng, size))
        wanted = random_chunks(rng, size)
        expected = create_read_items_for_chunk_list("fqn", metadata, wanted)
        actual = dcp_fast.create_read_items_for_chunk_list("fqn", metadata, wanted)
        assert actual == expected, (dims, seed)
        for ours, theirs in zip(actual, expected, strict=True):
            # MetadataIndex leaves the index out of comparisons.
            assert ours.dest_index.index == theirs.dest_index.index
            assert ours.storage_index.index == theirs.storage_index.index
            for name in ("dest_offsets", "storage_offsets", "lengths"):
                assert type(getattr(ours, name)) is type(getattr(theirs, name))
            assert type(ours.dest_index.offset) is type(theirs.dest_index.offset)
        found += len(expected)
    assert found > 500


def test_read_items_of_large_offsets() -> None:
    far = 1 << 40
    stored = [ChunkStorageMetadata(torch.Size([far + 10 * i]), torch.Size([10])) for i in range(5)]
    wanted = [ChunkStorageMetadata(torch.Size([far + 15]), torch.Size([20]))]
    expected = create_read_items_for_chunk_list("f", tensor_metadata([2 * far], stored), wanted)
    assert dcp_fast.create_read_items_for_chunk_list("f", tensor_metadata([2 * far], stored), wanted) == expected
    assert len(expected) == 3


@pytest.mark.parametrize(("stored_dims", "wanted_dims"), [(1, 2), (2, 1), (0, 1), (3, 1), (1, 0)])
def test_read_items_of_different_dimensions(stored_dims: int, wanted_dims: int) -> None:
    stored = [ChunkStorageMetadata(torch.Size([0] * stored_dims), torch.Size([4] * stored_dims))] * 2
    wanted = [ChunkStorageMetadata(torch.Size([1] * wanted_dims), torch.Size([2] * wanted_dims))]
    metadata = tensor_metadata([4] * stored_dims, stored)
    try:
        expected: Any = create_read_items_for_chunk_list("f", metadata, wanted)
    except Exception as error:
        with pytest.raises(type(error)):
            dcp_fast.create_read_items_for_chunk_list("f", metadata, wanted)
    else:
        assert dcp_fast.create_read_items_for_chunk_list("f", metadata, wanted) == expected


def test_read_items_where_nothing_is_stored_or_wanted() -> None:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    assert dcp_fast.create_read_items_for_chunk_list("f", tensor_metadata([4], []), [chunk]) == []
    assert dcp_fast.create_read_items_for_chunk_list("f", tensor_metadata([4], [chunk]), []) == []
    assert len(dcp_fast.create_read_items_for_chunk_list("f", tensor_metadata([4], [chunk]), [chunk])) == 1


def random_problem(rng: random.Random) -> tuple[dict[str, Any], Metadata]:
    """A state dict, and the metadata of a checkpoint that may or may not suit it."""
    state: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    for number in range(rng.randint(1, 6)):
        fqn = f"k{number}"
        size = [rng.choice([0, 1, 3, 8]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5]))]
        kind = rng.random()
        if kind < 0.15:
            state[fqn] = rng.choice([1, "x", None, io.BytesIO(b""), torch.zeros(2)])
        elif kind < 0.6:
            state[fqn] = torch.zeros(size)
        else:
            chunks = random_chunks(rng, size)
            shards = [torch.zeros(chunk.sizes) for chunk in chunks]
            state[fqn] = ShardedBuffer.make(size, [chunk.offsets for chunk in chunks], shards)
        fate = rng.random()
        if fate < 0.04:
            continue
        if fate < 0.08:
            size = [*size, 1]
        elif fate < 0.12:
            state[fqn] = "value"
        stored[fqn] = BytesStorageMetadata() if kind < 0.15 else tensor_metadata(size, random_chunks(rng, size))
    return state, Metadata(stored, storage_data={})


def attempt(function: Any, *args: Any) -> tuple[LoadPlan | None, Exception | None]:
    try:
        return function(*args), None
    except Exception as error:
        return None, error


def test_local_plans_of_random_state_dicts() -> None:
    """With metadata as objects, as columns, and as columns of which some entries were looked at."""
    raised = 0
    planned = 0
    in_columns = 0
    for seed in range(1500):
        rng = random.Random(f"plan {seed}")
        state, metadata = random_problem(rng)
        strict = rng.random() < 0.7
        expected, error = attempt(torch_plan, state, metadata, strict)
        columns, touched = (parse_metadata(pickle.dumps(metadata), "") for _ in range(2))
        for fqn in rng.sample(sorted(metadata.state_dict_metadata), len(metadata.state_dict_metadata) // 2):
            assert touched.state_dict_metadata[fqn] == metadata.state_dict_metadata[fqn]
        for variant in (metadata, columns, touched):
            actual, our_error = attempt(create_default_local_load_plan, state, variant, strict)
            assert (type(our_error), str(our_error)) == (type(error), str(error)), seed
            in_columns += isinstance(actual, ColumnPlan)
            assert actual == expected, seed
            for ours, theirs in zip(actual.items if actual else [], expected.items if expected else [], strict=True):
                assert ours.dest_index.index == theirs.dest_index.index
                assert ours.storage_index.index == theirs.storage_index.index
        raised += error is not None
        planned += len(expected.items) if expected else 0
    assert raised > 100
    assert planned > 1000
    assert in_columns > 1000


def test_warning_where_the_checkpoint_has_no_data(caplog: pytest.LogCaptureFixture) -> None:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    metadata = Metadata({"gap": tensor_metadata([6], [chunk]), "full": tensor_metadata([4], [chunk])})
    with caplog.at_level(logging.WARNING, "dcp_fast"):
        plan = create_default_local_load_plan({"full": torch.zeros(4)}, metadata)
        assert not caplog.records
        plan = create_default_local_load_plan({"full": torch.zeros(4), "gap": torch.zeros(6)}, metadata)
    assert plan == torch_plan({"full": torch.zeros(4), "gap": torch.zeros(6)}, metadata)
    assert "gap" in caplog.text
    assert "full" not in caplog.text


def test_planner_without_metadata() -> None:
    for planner in (dcp.DefaultLoadPlanner(), dcp_fast.DefaultLoadPlanner()):
        planner.set_up_planner({"t": torch.zeros(2)}, None, True)
        with pytest.raises(AssertionError):
            planner.create_local_plan()


def test_planner_is_torchs_to_isinstance_and_arguments() -> None:
    planner = dcp_fast.DefaultLoadPlanner(False, False, True)
    assert isinstance(planner, dcp.DefaultLoadPlanner)
    assert vars(planner) == vars(dcp.DefaultLoadPlanner(False, False, True)) | {"trust_bytes": False}


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("flatten_sharded", [True, False])
def test_planner_arguments_through_torchs_reader(tmp_path: Path, flatten: bool, flatten_sharded: bool) -> None:
    """Our planner works with a reader that knows nothing of it."""
    dcp.save({"t": fill((3, 2), torch.float32), "n": 3}, checkpoint_id=tmp_path)
    states = []
    for cls in (dcp.DefaultLoadPlanner, dcp_fast.DefaultLoadPlanner):
        state: dict[str, Any] = {"t": torch.zeros(3, 2), "n": 0}
        planner = cls(flatten_state_dict=flatten, flatten_sharded_tensors=flatten_sharded)
        dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), planner=planner)
        assert state["t"].count_nonzero() > 0
        states.append(image(state))
    assert states[1] == states[0]


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("base", [dcp.FileSystemReader, dcp_fast.FileSystemReader])
def test_a_load_leaves_nothing_for_the_cyclic_collector(tmp_path: Path, base: Any, touched: bool) -> None:
    """Metadata may take gigabytes, and those who train may have turned the collector off."""
    dcp.save({"t": torch.ones(3), "u": torch.ones(2)}, checkpoint_id=tmp_path)
    seen: list[Any] = []

    class Watched(base):  # type: ignore[misc]
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata = super().read_metadata(*args, **kwargs)
            seen.append(weakref.ref(metadata))
            if touched:
                seen.append(weakref.ref(metadata.state_dict_metadata["t"]))
            return metadata

    gc.collect()
    gc.disable()
    try:
        dcp_fast.load({"t": torch.zeros(3), "u": torch.zeros(2)}, storage_reader=Watched(tmp_path))
        assert [reference() for reference in seen] == [None] * (1 + touched)
    finally:
        gc.enable()


# Planners that inherit torch's plan


class Counting(dcp.DefaultLoadPlanner):
    """Nothing of its own but a hook."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.committed: list[str] = []

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed.append(read_item.dest_index.fqn)


class Halved(Counting):
    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return LoadPlan(plan.items[::2])


def nested_state(value: float) -> dict[str, Any]:
    return {"a": {"b": torch.full((3, 2), value), "c": [torch.full((2,), value)]}, "step": value}


@pytest.mark.parametrize("flatten", [True, False])
def test_inherited_plans_are_made_by_the_search(tmp_path: Path, flatten: bool) -> None:
    state = nested_state(1.0) if flatten else {"b": torch.ones(3, 2), "c": torch.ones(2)}
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = []
    for load in (dcp.load, dcp_fast.load):
        planner = Counting(flatten_state_dict=flatten)
        result = nested_state(0.0) if flatten else {"b": torch.zeros(3, 2), "c": torch.zeros(2)}
        load(result, checkpoint_id=tmp_path, planner=planner)
        loaded.append((image(result), planner.committed, planner.state_dict.keys(), planner.metadata is not None))
    assert loaded[0] == loaded[1]
    report = dcp_fast.last_report()
    assert report is not None
    assert report.planner_fallback_reason.startswith("items are read one by one, as its hooks change")


def test_own_plans_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save(nested_state(1.0), checkpoint_id=tmp_path)
    counts = []
    patched = Counting()
    monkeypatch.setattr(patched, "create_local_plan", lambda: LoadPlan([]))
    for planner in (Counting(), Halved(), patched):
        dcp_fast.load(nested_state(0.0), checkpoint_id=tmp_path, planner=planner)
        counts.append(len(planner.committed))
    assert counts == [2, 1, 0]
    # A planner whose method is another object's.
    wrapping = Counting()
    monkeypatch.setattr(wrapping, "set_up_planner", Counting().set_up_planner)
    with pytest.raises(dcp.api.CheckpointException) as ours:
        dcp_fast.load(nested_state(0.0), checkpoint_id=tmp_path, planner=wrapping)
    with pytest.raises(dcp.api.CheckpointException) as theirs:
        dcp.load(nested_state(0.0), checkpoint_id=tmp_path, planner=wrapping)
    assert type(ours.value.failures[0][0]) is type(theirs.value.failures[0][0])


def test_plans_that_somebody_patches_into_torch_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save(nested_state(1.0), checkpoint_id=tmp_path)
    monkeypatch.setattr(dcp.DefaultLoadPlanner, "create_local_plan", lambda planner: LoadPlan([]))
    planner = Counting()
    dcp_fast.load(nested_state(0.0), checkpoint_id=tmp_path, planner=planner)
    assert planner.committed == []
