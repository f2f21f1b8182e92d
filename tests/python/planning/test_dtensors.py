"""Plans of DTensors: what is computed once for all that are alike is what torch computes for each."""

from __future__ import annotations

import gc
import itertools
import pickle
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from metadata_cases import parse_metadata
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_fast.planning import search
from dcp_fast.planning.search import create_default_local_load_plan

torch_plan = default_planner.create_default_local_load_plan

RANKS = 8
SHAPES = [(16, 6), (13, 6), (3, 5), (8,), (0, 4), (1, 1), (16, 6, 2)]


class Backwards(Shard):
    """Equals torch's, and another of its class, but splits a tensor as it was told."""

    def __init__(self, dim: int, is_last: bool = False) -> None:
        super().__init__(dim)
        self.is_last = is_last

    def _end(self, size: int) -> tuple[int, int]:
        return (1, size - 1) if self.is_last and size else (min(size, 1), 0)

    def local_shard_size_and_offset(self, curr_local_size: int, *_: Any, **__: Any) -> tuple[int, int]:
        return self._end(curr_local_size)

    def _local_shard_size_and_offset(self, curr_local_size: int, *_: Any, **__: Any) -> tuple[int, int]:
        return self._end(curr_local_size)


@pytest.fixture(params=[0, 3, 7])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of eight ranks that never communicates, of which this process is one."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    yield request.param
    dist.destroy_process_group()


def meshes() -> list[DeviceMesh]:
    ranks = list(range(RANKS))
    grids: list[Any] = [ranks, ranks, [ranks[:4], ranks[4:]], ranks[:4], ranks[2:], ranks[::-1]]
    return [DeviceMesh("cpu", grid) for grid in grids]


def dtensor(mesh: DeviceMesh, placements: list[Any], shape: tuple[int, ...]) -> DTensor:
    whole = torch.empty(0).expand(0) if not shape else torch.empty(shape, device="meta")
    local = torch.zeros((0,) * len(shape))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=whole.stride())


def random_placement(rng: random.Random, dims: int) -> Any:
    kind = rng.random()
    dim = rng.randrange(dims)
    if kind < 0.6:
        return Shard(dim)
    if kind < 0.8:
        return Replicate()
    if kind < 0.9:
        return _StridedShard(dim, split_factor=rng.choice([2, 4]))
    return Backwards(dim, rng.random() < 0.5)


def stored(shape: tuple[int, ...]) -> TensorStorageMetadata:
    cut = shape[0] // 3
    chunks = [
        ChunkStorageMetadata(torch.Size([at, *(0,) * (len(shape) - 1)]), torch.Size([size, *shape[1:]]))
        for at, size in ((0, cut), (cut, shape[0] - cut))
    ]
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(shape), chunks)


def random_problem(rng: random.Random, grids: list[DeviceMesh]) -> tuple[dict[str, Any], Metadata]:
    state: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for number in range(rng.randrange(1, 80)):  # more than are looked at together
        fqn = f"k{number}"
        shape = rng.choice(SHAPES)
        kind = rng.random()
        mesh = rng.choice(grids)
        entries[fqn] = stored(shape)
        if kind < 0.1:
            state[fqn] = torch.zeros(shape)
        elif kind < 0.15:
            state[fqn] = torch.nn.Parameter(torch.zeros(shape))
        elif kind < 0.2:
            state[fqn], entries[fqn] = rng.choice([3, torch.zeros(2)]), BytesStorageMetadata()
        else:
            state[fqn] = dtensor(mesh, [random_placement(rng, len(shape)) for _ in range(mesh.ndim)], shape)
        fate = rng.random()
        if fate < 0.003:
            state[fqn] = dtensor(mesh, [Partial()] * mesh.ndim, shape)
        elif fate < 0.006:
            entries[fqn] = stored((shape[0] + 1, *shape[1:]))
        elif fate < 0.009:
            del entries[fqn]
    shuffled = list(entries.items())
    if rng.random() < 0.5:
        rng.shuffle(shuffled)
    return state, Metadata(dict(shuffled), storage_data={})


def attempt(function: Any, *args: Any) -> tuple[LoadPlan | None, Exception | None]:
    try:
        return function(*args), None
    except Exception as error:
        return None, error


def assert_same_plans(state: dict[str, Any], metadata: Metadata, strict: bool = True) -> Exception | None:
    """With metadata as objects, as columns, and as columns of which some entries were looked at."""
    expected, error = attempt(torch_plan, state, metadata, strict)
    columns, touched = (parse_metadata(pickle.dumps(metadata), "") for _ in range(2))
    for fqn in list(metadata.state_dict_metadata)[::3]:
        assert touched.state_dict_metadata[fqn] == metadata.state_dict_metadata[fqn]
    for variant in (metadata, columns, touched):
        actual, our_error = attempt(create_default_local_load_plan, state, variant, strict)
        assert (type(our_error), str(our_error)) == (type(error), str(error))
        assert actual == expected
        for ours, theirs in zip(actual.items if actual else [], expected.items if expected else [], strict=True):
            assert ours.dest_index.index == theirs.dest_index.index
            assert ours.storage_index.index == theirs.storage_index.index
    return error


def test_random_state_dicts(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = meshes()
    asked = 0
    create = search.create_chunk_list

    def counted(value: Any) -> Any:
        nonlocal asked
        asked += 1
        return create(value)

    monkeypatch.setattr(search, "create_chunk_list", counted)
    raised = tensors = 0
    for seed in range(120):
        rng = random.Random(f"{rank} {seed}")
        state, metadata = random_problem(rng, grids)
        raised += assert_same_plans(state, metadata, rng.random() < 0.7) is not None
        tensors += len(state)
    assert 5 < raised < 60
    assert asked < 2.5 * tensors  # of three plans each


def test_known_shards_are_asked_for_once(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    create = search.create_chunk_list
    monkeypatch.setattr(search, "create_chunk_list", lambda value: asked.append(value) or create(value))
    mesh = meshes()[0]
    state = {f"k{i}": dtensor(mesh, [Shard(0)], SHAPES[i % 2]) for i in range(100)}
    entries = {fqn: stored(tuple(value.shape)) for fqn, value in state.items()}
    metadata = parse_metadata(pickle.dumps(Metadata(entries, storage_data={})), "")
    plan = create_default_local_load_plan(state, metadata)
    assert len(plan.items) >= 50
    assert len(asked) == 2


@pytest.mark.parametrize("rank", [3], indirect=True)
def test_equal_placements_that_are_not_the_same(rank: int) -> None:
    mesh = meshes()[0]
    kinds = [Shard(0), Backwards(0), Backwards(0, True), _StridedShard(0, split_factor=2), Shard(1), Replicate()]
    state = {}
    for number, (first, second) in enumerate(itertools.permutations(kinds, 2)):
        state |= {f"{number}a": dtensor(mesh, [first], (16, 6)), f"{number}b": dtensor(mesh, [second], (16, 6))}
    metadata = Metadata(dict.fromkeys(state, stored((16, 6))), storage_data={})
    assert assert_same_plans(state, metadata) is None
    boxes = {(item.dest_index.offset, item.lengths) for item in torch_plan(state, metadata).items}
    assert len(boxes) >= 5


@pytest.mark.parametrize("rank", [3], indirect=True)
def test_attributes_that_say_more(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = meshes()[0]
    state = {f"k{i}": dtensor(mesh, [Shard(0)], (16, 6)) for i in range(8)}
    metadata = Metadata(dict.fromkeys(state, stored((16, 6))), storage_data={})
    row = [ChunkStorageMetadata(torch.Size([9, 0]), torch.Size([1, 6]))]
    state["k2"].__create_chunk_list__ = lambda: row
    state["k4"]._local_tensor.__create_chunk_list__ = lambda: row
    state["k5"].note = "of no meaning to torch"
    state["k6"].to("cpu")
    assert assert_same_plans(state, metadata) is None
    boxes = [item.dest_index.offset for item in torch_plan(state, metadata).items]
    assert boxes.count(torch.Size([9, 0])) == 2
    state["k3"].size = lambda: torch.Size([1])
    assert isinstance(assert_same_plans(state, metadata), ValueError)
    del state["k3"]
    monkeypatch.setattr(DTensor, "__create_chunk_list__", lambda value: row[: id(value) % 32 // 16])
    assert assert_same_plans(state, metadata) is None


@pytest.mark.parametrize("rank", [3], indirect=True)
def test_nothing_is_remembered_beyond_a_plan(rank: int) -> None:
    mesh = DeviceMesh("cpu", list(range(RANKS)))
    state = {f"k{i}": dtensor(mesh, [Shard(0)], (16, 6)) for i in range(4)}
    metadata = Metadata(dict.fromkeys(state, stored((16, 6))), storage_data={})
    columns = parse_metadata(pickle.dumps(metadata), "")
    assert create_default_local_load_plan(state, columns) == torch_plan(state, metadata)
    for value in state.values():
        value._spec = dtensor(mesh, [Shard(1)], (16, 6))._spec
    assert create_default_local_load_plan(state, columns) == torch_plan(state, metadata)
    gone = weakref.ref(state["k0"])
    gc.collect()
    gc.disable()
    try:
        plan = create_default_local_load_plan(state, parse_metadata(pickle.dumps(metadata), ""))
        del plan, state, value
        assert gone() is None
    finally:
        gc.enable()
