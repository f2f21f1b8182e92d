"""Real ranks whose tensors lie on CUDA devices: DTensor, ShardedTensor and optimizer state."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_load, fill, image, save
from optimizer_cases import KEY, Scenario, assert_same_result, check, fast_reader, load_fast
from processes import SIMULATED, use_devices
from ranks import Ranks
from simulated_cuda.control import Simulator
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast
from dcp_fast.ranks import collectives, shared_metadata

SIZE = (10, 7)
FLOAT = torch.float32
ILLEGAL_ADDRESS = 700  # CUresult


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Ranks of this module alone: what makes simulated devices of torch's stays in a process."""
    ranks = Ranks()
    yield ranks
    ranks.close()


def begin(path: Path) -> None:
    use_devices()
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())


def end(path: Path) -> None:
    """What the fixture of the other tests does, in each rank."""
    dcp_fast.release_staging()
    torch.cuda.synchronize()
    if SIMULATED:
        assert not Simulator().reports(clear=True)


def check_on_devices(pool: Ranks, world_size: int, scenarios: list[Scenario], path: Path) -> None:
    check(pool, world_size, [begin, *scenarios, end], path)


# DTensor

STORED: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {
    "rows": (SIZE, FLOAT, 0),
    "columns": (SIZE, torch.bfloat16, 1),
    "blocks": (SIZE, torch.int64, 2),
    "few": ((1, 5), FLOAT, 3),  # fewer rows than ranks: some hold nothing
    "nothing": ((0, 3), FLOAT, 4),
}
PLACEMENTS: dict[int, list[tuple[Any, ...]]] = {
    1: [(Shard(0),), (Shard(1),), (Replicate(),)],
    2: [(Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(1))],
}
MESHES: dict[int, list[tuple[int, ...]]] = {2: [(2,), (1, 2)], 1: [(1,)]}


def values(name: str) -> torch.Tensor:
    return fill(*STORED[name])


def full_on_host(tensor: DTensor) -> torch.Tensor:
    """All of a DTensor. By way of the host: gloo cannot gather what lies on devices."""
    mesh = init_device_mesh("cpu", tuple(tensor.device_mesh.shape))
    local = tensor.to_local().cpu()
    facts = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(local, mesh, tensor.placements, **facts).full_tensor()


def save_dtensors(path: Path) -> None:
    """Torch's own writer copies from the devices."""
    mesh = init_device_mesh("cuda", (2,))
    placements = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0), "blocks": Shard(0), "nothing": Shard(1)}
    state: dict[str, Any] = {
        name: distribute_tensor(values(name).cuda(), mesh, [placement]) for name, placement in placements.items()
    }
    save(path / "dtensors", {**state, "step": 12})


def load_dtensors(path: Path) -> None:
    for shape in MESHES[dist.get_world_size()]:
        mesh = init_device_mesh("cuda", shape)
        for placements in PLACEMENTS[len(shape)]:

            def make(mesh: Any = mesh, placements: Any = placements) -> dict[str, Any]:
                state: dict[str, Any] = {"step": 0}
                for name, (size, dtype, _) in STORED.items():
                    state[name] = zeros_on(*size, dtype=dtype, device_mesh=mesh, placements=placements)
                return state

            outcome = assert_same_load(path / "dtensors", make)
            assert outcome.state["rows"].to_local().is_cuda
            full = full_on_host(outcome.state["rows"])
            assert torch.equal(full.view(torch.int32), values("rows").view(torch.int32))


def load_converted_dtensors(path: Path) -> None:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for synchronize in (True, False):
        assert_same_load(
            path / "dtensors",
            lambda: {"blocks": zeros_on(*SIZE, dtype=torch.int32, device_mesh=mesh, placements=[Shard(1)])},
            options={"synchronize": synchronize},
        )


def load_meta_dtensors(path: Path) -> None:
    """Torch puts them on the devices of the mesh."""
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))

    def make() -> dict[str, Any]:
        local = torch.empty(zeros_on(*SIZE, device_mesh=mesh, placements=[Shard(0)]).to_local().shape, device="meta")
        return {"rows": DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=SIZE, stride=(7, 1))}

    assert_same_load(path / "dtensors", make)


# ShardedTensor


def sharded(parts: list[tuple[int, list[int], list[int]]], source: torch.Tensor) -> ShardedTensor:
    """A ShardedTensor of (rank, offsets, sizes) on the current device of each rank."""
    count = torch.cuda.device_count()
    metadata = [ShardMetadata(at, sizes, f"rank:{rank}/cuda:{rank % count}") for rank, at, sizes in parts]
    local = []
    for shard, (rank, at, sizes) in zip(metadata, parts, strict=True):
        if rank == dist.get_rank():
            where = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            local.append(LocalShard(source[where].clone().cuda(), shard))
    facts = ShardedTensorMetadata(metadata, torch.Size(SIZE), TensorProperties(dtype=FLOAT))
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, facts)


ROWS = [(0, [0, 0], [6, 7]), (1, [6, 0], [4, 7])]
BLOCKS = [(i % 2, [r, c], [5, w]) for i, (r, c, w) in enumerate([(0, 0, 3), (0, 3, 4), (5, 0, 3), (5, 3, 4)])]


def sharded_tensors(path: Path) -> None:
    save(path / "sharded", {"t": sharded(ROWS, values("rows"))})
    for layout in (ROWS, BLOCKS):
        outcome = assert_same_load(path / "sharded", lambda layout=layout: {"t": sharded(layout, torch.zeros(SIZE))})
        assert all(shard.tensor.is_cuda for shard in outcome.state["t"].local_shards())
    mesh = init_device_mesh("cuda", (2,))
    assert_same_load(path / "sharded", lambda: {"t": zeros_on(*SIZE, device_mesh=mesh, placements=[Shard(1)])})


# Optimizer state


def optimizer_state(path: Path) -> None:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    sizes = {"net.w": (6, 3), "net.b": (5,)}
    full = {name: {"exp_avg": fill(size, FLOAT, 7), "step": torch.tensor(3.0)} for name, size in sizes.items()}
    save(path / "optimizer", {KEY: {"state": full, "param_groups": [{"lr": 0.1, "params": list(sizes)}]}})

    def model() -> dict[str, Any]:
        return {
            name: distribute_tensor(torch.zeros(size).cuda(), mesh, [Shard(0)], src_data_rank=None)
            for name, size in sizes.items()
        }

    # Torch puts it where the process group is at home; for gloo that is the host.
    assert_same_result(path / "optimizer", model)
    loaded = load_fast(model(), KEY, fast_reader(path / "optimizer"), like="model")[KEY]
    for name in sizes:
        average = loaded["state"][name]["exp_avg"]
        assert isinstance(average, DTensor)
        assert average.placements == (Shard(0),)
        assert average.to_local().is_cuda
        assert average.device == model()[name].device
        assert image(full_on_host(average)) == image(full[name]["exp_avg"])
        assert image(loaded["state"][name]["step"].cpu()) == image(full[name]["step"])


# A device that is lost


def lose_device(path: Path, group_has_cpu: bool) -> dict[int, str]:
    """Load on two ranks, on one of which the GPU breaks for good. Returns the errors that this rank is told of."""
    begin(path)
    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device())
    state = {"rows": torch.zeros(SIZE, device=device)}
    torch.cuda.synchronize()
    reduce = dist.all_reduce

    def refuses_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == "cpu":
            raise RuntimeError("No backend type associated with device type cpu")
        return reduce(tensor.cpu(), *args, **kwargs)

    class Planner(dcp_fast.DefaultLoadPlanner):
        def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
            if rank == 1:
                simulator.fault("cuMemcpyHtoDAsync_v2", 1, ILLEGAL_ADDRESS, asynchronous=True)
            return new_plan

    simulator = Simulator()
    options: dict[str, Any] = {"planner": Planner()}
    with ExitStack() as patches:
        if not group_has_cpu:
            patches.enter_context(mock.patch.object(collectives, "collective_device", return_value=device))
            patches.enter_context(mock.patch.object(dist, "all_reduce", refuses_cpu))
            options["process_group"] = dist.new_group(timeout=datetime.timedelta(seconds=3))
        try:
            dcp_fast.load(state, checkpoint_id=path / "dtensors", **options)
            failures = {}
        except CheckpointException as error:
            failures = {rank: type(wrapped[0]).__name__ for rank, wrapped in error.failures.items()}
        except RuntimeError:
            failures = {-1: "the group"}
    simulator.reset()
    dcp_fast.release_staging()
    return failures


# Metadata that ranks share through a backend whose tensors lie on devices


def share_metadata(path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with (
        mock.patch.object(shared_metadata, "collective_device", return_value=device),
        mock.patch.object(shared_metadata, "_LEAST_BYTES", 0),
        mock.patch.object(shared_metadata, "_BLOCK_BYTES", 1000),
    ):
        state = {"rows": torch.zeros(SIZE)}
        dcp_fast.load(state, checkpoint_id=path / "dtensors", share_metadata=True)
    assert image(state["rows"]) == image(values("rows"))
    report = dcp_fast.last_report()
    assert report is not None
    assert report.metadata_received == (dist.get_rank() != 0)


@pytest.fixture(scope="module")
def stored(pool: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    check_on_devices(pool, 2, [save_dtensors], path)
    return path


@pytest.mark.parametrize("world_size", [2, 1])
def test_dtensors(pool: Ranks, stored: Path, world_size: int) -> None:
    check_on_devices(pool, world_size, [load_dtensors, load_converted_dtensors, load_meta_dtensors], stored)


def test_shared_metadata(pool: Ranks, stored: Path) -> None:
    check_on_devices(pool, 2, [share_metadata], stored)


def test_sharded_tensors(pool: Ranks, tmp_path: Path) -> None:
    check_on_devices(pool, 2, [sharded_tensors], tmp_path)


@pytest.mark.parametrize("world_size", [2, 1])
def test_optimizer_state(pool: Ranks, tmp_path: Path, world_size: int) -> None:
    check_on_devices(pool, world_size, [optimizer_state], tmp_path)


def test_a_lost_device_is_an_error_on_all_ranks(pool: Ranks, stored: Path, simulator: Simulator) -> None:
    """The flag goes through the host: it needs no device."""
    assert pool.run(2, lose_device, stored, True) == [{1: "CudaError"}] * 2


def test_a_lost_device_and_a_group_without_the_host(pool: Ranks, stored: Path, simulator: Simulator) -> None:
    """The rank itself says what happened, and others end when the time of the group is up."""
    assert pool.run(2, lose_device, stored, False) == [{-1: "the group"}, {1: "CudaError"}]
