"""Differential tests with real ranks: DTensor and ShardedTensor, saved by some ranks and loaded by others."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import assert_same_load, fast_reader, fill, image, load_with, save, torch_load, torch_reader
from ranks import Ranks
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast

SIZE = (10, 7)
FLOAT = torch.float32

Scenario = Callable[[Path], None]


def run_all(scenarios: list[str], path: Path) -> list[str]:
    """Run scenarios by name; what failed on this rank. A failure after the collective calls stops nobody else."""
    failures = []
    for name in scenarios:
        try:
            globals()[name](path)
        except Exception:
            failures.append(f"{name}:\n{traceback.format_exc()}")
        dist.barrier()
    return failures


def check(ranks: Ranks, world_size: int, scenarios: list[Scenario], path: Path) -> None:
    results = ranks.run(world_size, run_all, [scenario.__name__ for scenario in scenarios], path)
    failures = [f"rank {rank}: {text}" for rank, texts in enumerate(results) for text in texts]
    assert not failures, "\n".join(failures)


# DTensor

MESHES: dict[int, list[tuple[int, ...]]] = {4: [(4,), (2, 2)], 3: [(3,)], 2: [(2,), (1, 2)], 1: [(1,)]}
PLACEMENTS: dict[int, list[tuple[Any, ...]]] = {
    1: [(Shard(0),), (Shard(1),), (Replicate(),)],
    2: [
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
        (Replicate(), Replicate()),
    ],
}
STORED = {
    "rows": (SIZE, FLOAT, 0),
    "columns": (SIZE, torch.bfloat16, 1),
    "blocks": (SIZE, torch.int64, 2),
    "few": ((2, 5), FLOAT, 3),  # fewer rows than ranks: some hold nothing
    "one": ((1,), torch.float64, 4),
    "plain": (SIZE, torch.complex64, 5),
    "nothing": ((0, 3), FLOAT, 6),
}


def whole(name: str) -> torch.Tensor:
    return fill(*STORED[name])


def save_dtensors(path: Path) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    state: dict[str, Any] = {
        "rows": distribute_tensor(whole("rows"), line, [Shard(0)]),
        "columns": distribute_tensor(whole("columns"), line, [Shard(1)]),
        "blocks": distribute_tensor(whole("blocks"), square, [Shard(0), Shard(1)]),
        "few": distribute_tensor(whole("few"), line, [Shard(0)]),
        "one": distribute_tensor(whole("one"), square, [Replicate(), Shard(0)]),
        "plain": whole("plain"),
        "nothing": distribute_tensor(whole("nothing"), line, [Shard(0)]),
        "step": 12,
    }
    save(path / "dtensors", state)


def load_dtensors(path: Path) -> None:
    for shape in MESHES[dist.get_world_size()]:
        mesh = init_device_mesh("cpu", shape)
        for placements in PLACEMENTS[len(shape)]:

            def make(mesh: Any = mesh, placements: Any = placements, dtype: Any = None) -> dict[str, Any]:
                state: dict[str, Any] = {"step": 0}
                for name, (size, stored_dtype, _) in STORED.items():
                    valid = [p if p.is_replicate() or p.dim < len(size) else Replicate() for p in placements]
                    state[name] = zeros_on(*size, dtype=dtype or stored_dtype, device_mesh=mesh, placements=valid)
                return state

            outcome = assert_same_load(path / "dtensors", make)
            full = outcome.state["rows"].full_tensor()
            assert torch.equal(full.view(torch.int32), whole("rows").view(torch.int32))
            assert_same_load(path / "dtensors", lambda make=make: make(dtype=torch.complex128))


def load_plain_tensors(path: Path) -> None:
    def make() -> dict[str, Any]:
        return {name: torch.zeros(size, dtype=dtype) for name, (size, dtype, _) in STORED.items()}

    assert_same_load(path / "dtensors", make)


def load_meta_dtensors(path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> dict[str, Any]:
        with torch.device("meta"):
            local = torch.empty(zeros_on(*SIZE, device_mesh=mesh, placements=[Shard(0)]).to_local().shape)
        return {"rows": DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=SIZE, stride=(7, 1))}

    outcome = assert_same_load(path / "dtensors", make)
    assert outcome.state["rows"].to_local().device.type == "cpu"


def strided_locals(path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> dict[str, Any]:
        rows = zeros_on(*SIZE, device_mesh=mesh, placements=[Shard(0)]).to_local().shape[0]
        local = torch.zeros(2 * rows, 14)[::2, 1::2]
        return {"rows": DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=SIZE, stride=(7, 1))}

    assert_same_load(path / "dtensors", make)


def submesh(path: Path) -> None:
    """DTensors that only half of the ranks hold, saved and loaded."""
    meshes = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]]
    meshes.append(dist.device_mesh.DeviceMesh("cpu", [0, 1]))
    for number, mesh in enumerate(meshes):
        full = fill((5, 4), FLOAT, number)
        here = mesh.get_coordinate() is not None
        local = full.chunk(2)[mesh.get_local_rank()].clone() if here else torch.empty(0)
        stored = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(5, 4), stride=(4, 1))
        save(path / f"submesh{number}", {"t": stored, "n": number})

        def make(mesh: Any = mesh, here: bool = here, local: Any = local) -> dict[str, Any]:
            zero = torch.zeros_like(local)
            tensor = DTensor.from_local(zero, mesh, [Shard(0)], run_check=False, shape=(5, 4), stride=(4, 1))
            return {"t": tensor, "n": -1}

        assert_same_load(path / f"submesh{number}", make)
        everywhere = init_device_mesh("cpu", (4,))
        assert_same_load(
            path / f"submesh{number}",
            lambda mesh=everywhere: {"t": zeros_on(5, 4, device_mesh=mesh, placements=[Shard(1)])},
        )


def partial_placements(path: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    make = lambda: {"rows": DTensor.from_local(torch.zeros(SIZE), mesh, [Partial()], run_check=False)}  # noqa: E731
    assert_same_load(path / "dtensors", make, raises=ValueError)


def read_without_collectives(path: Path) -> None:
    """Every rank for itself: its own metadata, and no_dist."""
    where = path / "rank_local"
    writer = dcp.FileSystemWriter(where, sync_files=False)
    value = fill((4, 3), FLOAT, dist.get_rank())
    dcp.save({"t": value, "rank": dist.get_rank()}, storage_writer=writer, use_collectives=False)
    dist.barrier()
    assert (where / f"__{dist.get_rank()}.metadata").exists()
    outcome = assert_same_load(where, lambda: {"t": torch.zeros(4, 3), "rank": -1})
    assert outcome.state["rank"] == dist.get_rank()
    assert_same_load(path / "dtensors", lambda: {"plain": torch.zeros(SIZE, dtype=torch.complex64)}, no_dist=True)


def process_group_of_some(path: Path) -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() in (1, 2):
        make = lambda: {"plain": torch.zeros(SIZE, dtype=torch.complex64), "step": 0}  # noqa: E731
        assert_same_load(path / "dtensors", make, process_group=group)


@pytest.fixture(scope="module")
def shared(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that four ranks wrote."""
    path = tmp_path_factory.mktemp("distributed")
    check(ranks, 4, [save_dtensors, save_sharded_tensors], path)
    return path


@pytest.mark.parametrize("world_size", [4, 3, 2, 1])
def test_dtensors_on_other_meshes(ranks: Ranks, shared: Path, world_size: int) -> None:
    check(ranks, world_size, [load_dtensors, load_plain_tensors, load_meta_dtensors, strided_locals], shared)


def test_parts_of_the_ranks(ranks: Ranks, shared: Path, tmp_path: Path) -> None:
    check(ranks, 4, [process_group_of_some], shared)
    check(ranks, 4, [save_dtensors, submesh, partial_placements, read_without_collectives], tmp_path)


# ShardedTensor


def sharded(
    parts: list[tuple[int, list[int], list[int]]], size: tuple[int, ...], fill_from: torch.Tensor | None
) -> Any:
    """A ShardedTensor of (rank, offsets, sizes), with the values of a whole tensor or zeros."""
    metadata = [ShardMetadata(at, sizes, f"rank:{rank}/cpu") for rank, at, sizes in parts]
    local = []
    for shard, (rank, at, sizes) in zip(metadata, parts, strict=True):
        if rank == dist.get_rank():
            where = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            tensor = torch.zeros(sizes) if fill_from is None else fill_from[where].clone()
            local.append(LocalShard(tensor, shard))
    properties = TensorProperties(dtype=FLOAT)
    glob = ShardedTensorMetadata(metadata, torch.Size(size), properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, glob)


ROWS4 = [(rank, [at, 0], [n, 7]) for rank, (at, n) in enumerate([(0, 3), (3, 3), (6, 3), (9, 1)])]
SEVERAL = [(i % 2, [at, 0], [n, 7]) for i, (at, n) in enumerate([(0, 2), (2, 3), (5, 1), (6, 4)])]
BLOCKS = [(i % 2, [r, c], [5, w]) for i, (r, c, w) in enumerate([(0, 0, 3), (0, 3, 4), (5, 0, 3), (5, 3, 4)])]
# Empty shards, one of them at the same place as a shard that is not.
EMPTY = [(0, [0, 0], [4, 7]), (0, [4, 0], [0, 7]), (0, [4, 0], [6, 7]), (1, [10, 0], [0, 7])]


def save_sharded_tensors(path: Path) -> None:
    save(
        path / "sharded",
        {"t": sharded(ROWS4, SIZE, fill(SIZE, FLOAT)), "nested": {"t": sharded(ROWS4, SIZE, fill(SIZE, FLOAT, 1))}},
    )


def load_sharded_tensors(path: Path) -> None:
    layouts = [ROWS4] if dist.get_world_size() == 4 else [SEVERAL, BLOCKS, EMPTY]
    for layout in layouts:
        make = lambda layout=layout: {  # noqa: E731
            "t": sharded(layout, SIZE, None),
            "nested": {"t": sharded(layout, SIZE, None)},
        }
        holds = any(rank == dist.get_rank() and 0 not in sizes for rank, _, sizes in layout)
        assert_same_load(path / "sharded", make, changes=holds)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert_same_load(path / "sharded", lambda: {"t": zeros_on(*SIZE, device_mesh=mesh, placements=[Shard(1)])})


def nested_sharded_tensors(path: Path) -> None:
    """2-D: the only local shard of a ShardedTensor is itself one, as FSDP1 over tensor parallelism makes them."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    full = fill((8, 6), FLOAT, 8)

    def make(source: torch.Tensor | None) -> Any:
        outer_row, inner = rank // 2 * 4, rank % 2
        inner_metadata = [ShardMetadata([0, 3 * i], [4, 3], f"rank:{rank // 2 * 2 + i}/cpu") for i in range(2)]
        tensor = torch.zeros(4, 3)
        if source is not None:
            tensor = source[outer_row : outer_row + 4, 3 * inner : 3 * inner + 3].clone()
        properties = TensorProperties(dtype=FLOAT)
        local = ShardedTensor._init_from_local_shards_and_global_metadata(
            [LocalShard(tensor, inner_metadata[inner])],
            ShardedTensorMetadata(inner_metadata, torch.Size([4, 6]), properties),
            process_group=groups[rank // 2],
        )
        metadata = [
            ShardMetadata([4 * i, 0], [4, 6], f"rank:{rank if i == rank // 2 else 2 * i}/cpu") for i in range(2)
        ]
        outer = ShardedTensor._init_from_local_shards_and_global_metadata(
            [LocalShard(local, metadata[rank // 2])],
            ShardedTensorMetadata(metadata, torch.Size([8, 6]), properties),
        )
        return {"t": outer}

    save(path / "nested", make(full))
    states = []
    for load, reader in ((torch_load, torch_reader), (dcp_fast.load, fast_reader)):
        state = make(None)
        assert load_with(load, state, storage_reader=reader(path / "nested")).errors is None
        states.append(image(state["t"].local_shards()[0].tensor))
    assert states[1] == states[0] == image(make(full)["t"].local_shards()[0].tensor)


def test_sharded_tensors(ranks: Ranks, shared: Path, tmp_path: Path) -> None:
    check(ranks, 4, [load_sharded_tensors], shared)
    check(ranks, 2, [load_sharded_tensors], shared)
    check(ranks, 4, [nested_sharded_tensors], tmp_path)


# Errors


def fails_on_one_rank(path: Path) -> None:
    class Planner(dcp_fast.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            if dist.get_rank() == 1:
                raise KeyError("of one rank")
            super().load_bytes(read_item, value)

    outcome = assert_same_load(path / "dtensors", lambda: {"step": 0}, planner=Planner, raises=KeyError)
    assert outcome.errors is not None
    assert outcome.errors.keys() == {1}
    # The plan of one rank cannot be made; all ranks hear of it, and of the file that one rank does not find.
    size = SIZE if dist.get_rank() != 2 else (3, 3)
    outcome = assert_same_load(path / "dtensors", lambda: {"plain": torch.zeros(size)}, raises=ValueError)
    assert outcome.errors is not None
    assert outcome.errors.keys() == {2}


def loses_a_file(path: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    if dist.get_rank() == 0:
        (path / "dtensors" / "__3_0.distcp").unlink()
    dist.barrier()
    make = lambda: {"rows": zeros_on(*SIZE, device_mesh=mesh, placements=[Shard(0)])}  # noqa: E731
    outcome = assert_same_load(path / "dtensors", make, raises=FileNotFoundError)
    assert outcome.errors is not None
    assert outcome.errors.keys() == {3}
    with pytest.raises(CheckpointException) as info:
        dcp_fast.load(make(), checkpoint_id=path / "dtensors")
    error = info.value.failures[3][0]
    assert isinstance(error, dcp_fast.FileMissingError)
    assert error.path.endswith("__3_0.distcp")
    assert error.fqn == "rows"


def test_one_failing_rank(ranks: Ranks, tmp_path: Path) -> None:
    check(ranks, 4, [save_dtensors, fails_on_one_rank, loses_a_file], tmp_path)
