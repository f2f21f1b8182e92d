"""torch's own checkpoints, meshes and collectives on the simulated devices."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device_tensors import bits, counting
from torch.distributed._shard.sharded_tensor import Shard as ShardOfTensor
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


@pytest.mark.parametrize("target", ["cuda", "cpu", None])
def test_torch_save_and_load(cuda: torch.device, target: str | None) -> None:
    file = io.BytesIO()
    state = {"a": counting(4, 5).to(cuda), "b": counting(4, 5).to(cuda, torch.bfloat16)[1:, ::2]}
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, map_location=target)
    for name, tensor in state.items():
        assert loaded[name].device.type == (target or "cuda")
        assert bits(loaded[name]) == bits(tensor)
        assert loaded[name].stride() == tensor.stride()


@pytest.mark.usefixtures("gloo")
def test_mesh_and_collectives(cuda: torch.device) -> None:
    mesh = init_device_mesh("cuda", (1,))
    source = counting(4, 6).to(cuda)
    tensor = distribute_tensor(source, mesh, [Shard(0)])
    assert tensor.device == cuda
    assert tensor.to_local().device == cuda
    assert torch.equal(tensor.full_tensor(), source)
    assert torch.equal(tensor.redistribute(mesh, [Replicate()]).to_local(), source)
    summed = source.clone()
    dist.all_reduce(summed)
    dist.broadcast(summed, 0)
    gathered = [torch.zeros_like(source)]
    dist.all_gather(gathered, summed)
    assert torch.equal(gathered[0], source)


@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
@pytest.mark.usefixtures("gloo")
def test_stock_checkpoint_of_device_tensors(cuda: torch.device, tmp_path: Path) -> None:
    mesh = init_device_mesh("cuda", (1,))
    whole, part = counting(4, 6), counting(4, 6)[1:3, 2:5]

    def sharded(values: torch.Tensor) -> ShardedTensor:
        place = ShardMetadata(shard_offsets=[0, 0], shard_sizes=list(values.shape), placement="rank:0/cuda:0")
        return ShardedTensor._init_from_local_shards([ShardOfTensor(values.to(cuda), place)], values.shape)

    def state(scale: int) -> dict[str, Any]:
        return {
            "plain": part.to(cuda) * scale,
            "strided": (whole.to(cuda) * scale).t(),
            "dtensor": DTensor.from_local(whole.to(cuda) * scale, mesh, [Shard(1)]),
            "sharded": sharded(whole * scale),
            "host": part * scale,
        }

    dcp.save(state(1), checkpoint_id=tmp_path)
    loaded = state(0)
    dcp.load(loaded, checkpoint_id=tmp_path)
    for name, value in state(1).items():
        if name == "sharded":
            assert torch.equal(loaded[name].local_shards()[0].tensor, value.local_shards()[0].tensor)
        else:
            assert torch.equal(loaded[name], value), name
            assert loaded[name].device == value.device
