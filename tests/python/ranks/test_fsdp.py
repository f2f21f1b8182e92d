"""Differential tests of what training frameworks save: FSDP1, FSDP2 with tensor parallelism, CheckpointableTensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
from ranks import Ranks
from test_distributed import Scenario
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dcp_fast

try:
    from torch.distributed.checkpoint.protocol import CheckpointableTensor
except ImportError:
    CheckpointableTensor = None  # type: ignore[assignment,misc]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 10)
        self.second = nn.Linear(10, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(torch.relu(self.first(x))))


def train(model: nn.Module, seed: int, steps: int) -> torch.optim.Optimizer:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 7)).square().sum().backward()
        optimizer.step()
    return optimizer


def compare(path: Path, make: Any, collect: Any) -> None:
    """Load into what `make` makes with torch and with dcp_fast; compare what `collect` sees of it."""
    images = []
    for load, reader in ((torch_load, torch_reader), (dcp_fast.load, fast_reader)):
        model, optimizer = make()
        untouched = image(collect(model, optimizer))
        state = collect(model, optimizer)
        outcome = load_with(load, state, storage_reader=reader(path))
        assert outcome.errors is None, outcome.errors
        assert image(state) != untouched
        images.append(image(state))
    assert images[1] == images[0]
    report = dcp_fast.last_report()
    assert report is not None
    assert report.fallback_records == 0


# FSDP2


def fsdp2(seed: int, steps: int = 2, layout: str = "1d") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    world = dist.get_world_size()
    if layout == "2d":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, train(model, seed, steps)


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": len(optimizer_state)}


def save_fsdp2(path: Path) -> None:
    for layout in ("1d", "2d", "hsdp"):
        save(path / layout, collect(*fsdp2(1, layout=layout)))


def load_fsdp2(path: Path) -> None:
    layouts = ("1d", "2d", "hsdp") if dist.get_world_size() == 4 else ("1d",)
    for stored in ("1d", "2d", "hsdp"):
        for layout in layouts:
            compare(path / stored, lambda layout=layout: fsdp2(2, layout=layout), collect)


def resume_fsdp2(path: Path) -> None:
    """The whole way round: a loaded model computes what the saved one did."""
    model, optimizer = fsdp2(1)
    with torch.no_grad():
        expected = model.eval()(torch.ones(3, 7))
    save(path / "resume", collect(model, optimizer))
    model, optimizer = fsdp2(5)
    state = collect(model, optimizer)
    with dcp_fast.install():
        dcp.load(state, checkpoint_id=path / "resume")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(),
    )
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(3, 7)), expected)


# FSDP1


def fsdp1(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True)
    return model, train(model, seed, 2)


def collect_fsdp1(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    config = ShardedStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, config):
        state = {"model": model.state_dict()}
        # Ranks without a parameter of their own have no parameter groups, which torch's own load does not forgive.
        state["optimizer"] = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
    return state


def save_fsdp1(path: Path) -> None:
    save(path / "fsdp1", collect_fsdp1(*fsdp1(1)))


def load_fsdp1(path: Path) -> None:
    compare(path / "fsdp1", lambda: fsdp1(2), collect_fsdp1)
    compare(
        path / "fsdp1", lambda: fsdp1(2), lambda model, optimizer: {"model": collect_fsdp1(model, optimizer)["model"]}
    )


def run(ranks: Ranks, world_size: int, scenarios: list[Scenario], path: Path) -> None:
    results = ranks.run(world_size, run_scenarios, scenarios, path)
    assert results == [len(scenarios)] * world_size


def run_scenarios(scenarios: list[Scenario], path: Path) -> int:
    for scenario in scenarios:
        scenario(path)
        dist.barrier()
    return len(scenarios)


def test_fsdp2(ranks: Ranks, tmp_path: Path) -> None:
    run(ranks, 4, [save_fsdp2, load_fsdp2, resume_fsdp2], tmp_path)
    run(ranks, 2, [load_fsdp2], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_fsdp1(ranks: Ranks, tmp_path: Path) -> None:
    run(ranks, 4, [save_fsdp1, load_fsdp1], tmp_path)
    run(ranks, 2, [load_fsdp1], tmp_path)


# CheckpointableTensor: a plain tensor with attributes that say which parts of a global tensor it holds


def checkpointable(
    local: torch.Tensor, size: tuple[int, ...], parts: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
) -> Any:
    tensor: Any = local
    tensor.global_shape = size
    tensor.global_offsets = tuple(at for at, _, _ in parts)
    tensor.local_offsets = tuple(at for _, at, _ in parts)
    tensor.local_sizes = tuple(sizes for _, _, sizes in parts)
    return tensor


# (global offset, local offset, sizes); the buffers of 12 x 6 have padding around the shards.
PARTS = {
    "one": [((2, 1), (0, 0), (5, 4))],
    "two": [((0, 0), (1, 1), (4, 5)), ((6, 2), (7, 0), (2, 3))],
    "twice": [((3, 0), (0, 0), (4, 5)), ((3, 0), (6, 1), (4, 5))],
    "empty": [((3, 0), (0, 0), (0, 5)), ((3, 0), (6, 1), (4, 5))],
    "none": [],
}


@pytest.mark.skipif(CheckpointableTensor is None, reason="came with torch 2.14")
@pytest.mark.parametrize("kind", PARTS)
def test_checkpointable_tensor(tmp_path: Path, kind: str) -> None:
    whole = fill((8, 5), torch.int32)
    chunks = [((row, 0), whole[row : row + 3].clone()) for row in (0, 3, 6)]
    write_checkpoint(tmp_path, {"t": Entry((8, 5), torch.int32, chunks)})
    for dtype in (torch.int32, torch.int64):
        make = lambda dtype=dtype: {"t": checkpointable(torch.zeros(12, 6, dtype=dtype), (8, 5), PARTS[kind])}  # noqa: E731
        assert isinstance(make()["t"], CheckpointableTensor)
        assert_same_load(tmp_path, make, changes=kind != "none")


@pytest.mark.skipif(CheckpointableTensor is None, reason="came with torch 2.14")
def test_checkpointable_tensor_saved_by_torch(tmp_path: Path) -> None:
    parts = [((0, 0), (0, 0), (3, 4)), ((3, 0), (5, 1), (2, 4))]
    save(tmp_path, {"t": checkpointable(fill((7, 5), torch.float32), (5, 4), parts)})
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(5, 4)})
    assert_same_load(tmp_path, lambda: {"t": checkpointable(torch.zeros(7, 5), (5, 4), parts)})


@pytest.mark.skipif(CheckpointableTensor is None, reason="came with torch 2.14")
def test_checkpointable_tensor_of_another_size(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((5, 4), torch.float32)})
    parts = [((0, 0), (0, 0), (3, 4))]
    # The local shape is that of the checkpoint, the global one is not.
    assert_same_load(tmp_path, lambda: {"t": checkpointable(torch.zeros(5, 4), (9, 4), parts)}, raises=ValueError)


@pytest.mark.skipif(CheckpointableTensor is None, reason="came with torch 2.14")
def test_meta_checkpointable_tensor(tmp_path: Path, gloo: None) -> None:
    save(tmp_path / "ckpt", {"t": fill((5, 4), torch.float32)})
    parts = [((1, 0), (0, 0), (3, 4))]
    make = lambda: {"t": checkpointable(torch.zeros(3, 4, device="meta"), (5, 4), parts)}  # noqa: E731
    assert_same_load(tmp_path / "ckpt", make)
