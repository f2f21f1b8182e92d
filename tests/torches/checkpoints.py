"""Checkpoints that each torch writes and each other one loads, with values that anybody can compute.

Nothing here depends on the version that runs, but for what a version cannot write at all (`Kind.since`).
"""

from __future__ import annotations

import math
import pathlib
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import DTYPES, torch_reader
from inert_values import INERT
from metadata_cases import with_plans
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from training_runs import make_net, make_optimizer, train

__all__ = ["KINDS", "Kind", "running", "write"]

# Makes the state dict of this rank: with the values that are stored, or with others that a load replaces.
Make = Callable[[bool], dict[str, Any]]


def running() -> tuple[int, ...]:
    """The version of the torch that runs, as two numbers."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class Kind:
    """A checkpoint.

    Args:
        ranks: how many save it.
        make: the state dict that they save.
        loads: how else it is loaded than it was saved: the number of ranks and what they load into.
        options: makes those of torch's writer.
        add: what rank 0 does with the saved checkpoint.
        save: torch's function that saves.
        since: the first torch that can write it.
        fallback: how many records torch.load has to read for dcp_fast; None: any number.
        tensors: whether there are any, of which torch 2.15 stores more than earlier versions can read.
    """

    ranks: int
    make: Make
    loads: Mapping[str, tuple[int, Make]] = field(default_factory=dict)
    options: Callable[[], dict[str, Any]] = dict
    add: Callable[[Path], None] = lambda path: None
    save: Callable[..., Any] = dcp.save
    since: tuple[int, int] = (2, 11)
    fallback: int | None = 0
    tensors: bool = True

    def all_loads(self) -> dict[str, tuple[int, Make]]:
        return {"as it was saved": (self.ranks, self.make), **self.loads} if running() >= self.since else {**self.loads}


def write(folder: str, name: str) -> None:
    """Save one of the checkpoints, on each rank."""
    kind, path = KINDS[name], Path(folder, name)
    started = kind.save(kind.make(True), storage_writer=dcp.FileSystemWriter(path, sync_files=False, **kind.options()))
    if not isinstance(started, Metadata):
        started.result()
    if dist.get_rank() == 0:
        kind.add(path)


# Values


def known(name: str, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Bits that follow from the name."""
    count = math.prod(size)
    values = 1 if dtype == torch.bool else dtype.itemsize
    bits = (torch.arange(count * values) * 37 + zlib.crc32(name.encode())) % (2 if dtype == torch.bool else 251)
    return bits.to(torch.uint8).view(dtype).view(size)


def maker(sizes: Mapping[str, tuple[int, ...]], place: Callable[[str, torch.Tensor], Any]) -> Make:
    """A state dict whose tensors are put into place by a function."""

    def make(stored: bool) -> dict[str, Any]:
        tensors = {name: known(name, size) for name, size in sizes.items()}
        return {name: place(name, each if stored else torch.zeros_like(each)) for name, each in tensors.items()}

    return make


def dtypes(stored: bool) -> dict[str, Any]:
    state: dict[str, Any] = {str(dtype): known(str(dtype), (3, 5), dtype) for dtype in DTYPES}
    state |= {"scalar": known("scalar", ()), "empty": known("empty", (0, 3)), "one": known("one", (1,))}
    return state if stored else {name: torch.zeros_like(value) for name, value in state.items()}


def strided(stored: bool) -> dict[str, Any]:
    """Tensors whose elements are not one behind the other, or not as they are stored."""
    whole = known("strided", (6, 4, 3, 2)) if stored else torch.zeros(6, 4, 3, 2)
    waves = known("complex", (4, 6), torch.complex64) if stored else torch.zeros(4, 6, dtype=torch.complex64)
    return {
        "transposed": whole.flatten(1).t(),
        "permuted": whole.permute(2, 0, 3, 1),
        "every second": whole[::2],
        "columns": whole.flatten(1)[:, 5:9],
        "channels last": whole.contiguous(memory_format=torch.channels_last),
        "parameter": nn.Parameter(whole.clone()),
        "conjugate": waves.clone().conj(),
        "negative": waves.clone().conj().imag,
        "real": waves.clone().real,
    }


def quantized(stored: bool) -> dict[str, Any]:
    whole = torch.arange(-12.0, 12.0).view(4, 6) if stored else torch.zeros(4, 6)
    scales, zeros = torch.full((6,), 0.5), torch.zeros(6, dtype=torch.int64)
    return {
        "per tensor": torch.quantize_per_tensor(whole, 0.5, 3, torch.qint8),
        "unsigned": torch.quantize_per_tensor(whole, 0.5, 30, torch.quint8),
        "wide": torch.quantize_per_tensor(whole, 0.5, 0, torch.qint32),
        "per channel": torch.quantize_per_channel(whole, scales, zeros, 1, torch.qint8),
    }


def values(stored: bool) -> dict[str, Any]:
    return entries({name: value for name, value in INERT.items() if "tensor" not in name and name != "Path"}, stored)


def paths(stored: bool) -> dict[str, Any]:
    """Their classes are in a module of another name in Python 3.13."""
    return entries({"paths": INERT["Path"], "config": {"root": pathlib.Path("/data"), "steps": 3}}, stored)


def entries(found: Mapping[str, Any], stored: bool) -> dict[str, Any]:
    """Each value in a tuple, which is stored as one, whatever is in it; without what pickle leaves out."""
    return {name: pickle.loads(pickle.dumps((value,), 2)) if stored else "not loaded" for name, value in found.items()}


# Sharded by ranks

SIZES = {"even": (8, 4), "odd": (7, 5), "few rows": (2, 3), "vector": (9,), "empty": (0, 4), "deep": (4, 3, 2, 5)}


def sharded(*placements: Placement, mesh: tuple[int, ...] = ()) -> Make:
    def place(name: str, whole: torch.Tensor) -> DTensor:
        device_mesh = init_device_mesh("cpu", mesh or (dist.get_world_size(),))
        dims = [Replicate() if isinstance(p, Shard) and p.dim >= whole.dim() else p for p in placements]
        return distribute_tensor(whole, device_mesh, dims)

    return maker(SIZES, place)


def shards(_: str, whole: torch.Tensor) -> sharded_tensor.ShardedTensor:
    """One that each rank has some rows of."""
    spec = ChunkShardingSpec(0, [f"rank:{rank}/cpu" for rank in range(dist.get_world_size())])
    tensor = sharded_tensor.empty(spec, *whole.shape, dtype=whole.dtype)
    for shard in tensor.local_shards():
        first = shard.metadata.shard_offsets[0]
        shard.tensor.copy_(whole[first : first + shard.metadata.shard_sizes[0]])
    return tensor


def checkpointable(name: str, whole: torch.Tensor) -> torch.Tensor:
    """Rows of a global tensor in a plain one that says so by attributes, between rows that are not part of it."""
    rank, count = dist.get_rank(), dist.get_world_size()
    first, last = (whole.shape[0] * number // count for number in (rank, rank + 1))
    local: Any = torch.zeros(last - first + 2, *whole.shape[1:])
    local[1:-1] = whole[first:last]
    zeros = (0,) * (whole.dim() - 1)
    local.global_shape = tuple(whole.shape)
    local.global_offsets, local.local_offsets = ((first, *zeros),), ((1, *zeros),)
    local.local_sizes = ((last - first, *whole.shape[1:]),)
    return local  # type: ignore[no-any-return]


def whole(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


FILLED = {name: size for name, size in SIZES.items() if math.prod(size)}


# A job: a model and its optimizer, nested


def training(stored: bool, *, spread: bool) -> dict[str, Any]:
    """What `get_state_dict` makes of a model and Adam after a step, with known values in place of trained ones."""
    model = make_net(1)
    if spread:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = make_optimizer("adam", model)
    train(model, optimizer, 0, 1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": {"state": optimizer_state["state"]}, "epoch": [1, "two"]}
    fill_known(state, "", stored)
    if not stored:
        state["epoch"] = []
    return state


def fill_known(state: Mapping[str, Any], prefix: str, stored: bool) -> None:
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            fill_known(value, f"{name}.", stored)
        elif isinstance(value, torch.Tensor):
            whole = known(name, tuple(value.shape), value.dtype) if stored else torch.zeros(value.shape)
            with torch.no_grad():
                if isinstance(value, DTensor):
                    part = distribute_tensor(whole, value.device_mesh, value.placements).to_local()
                    value.to_local().copy_(part)
                else:
                    value.copy_(whole)


def add_plans(path: Path) -> None:
    """Put into the metadata what Megatron-Core does: objects of torch's own classes, whose fields differ by version."""
    metadata = torch_reader(path).read_metadata()
    (path / ".metadata").write_bytes(pickle.dumps(with_plans(metadata)))


ROWS, COLUMNS = sharded(Shard(0)), sharded(Shard(1))
EVERY_WAY: dict[str, tuple[int, Make]] = {
    "whole": (1, maker(SIZES, whole)),
    "rows of 3": (3, ROWS),
    "columns of 2": (2, COLUMNS),
}

KINDS: dict[str, Kind] = {
    "dtypes": Kind(1, dtypes),
    "files": Kind(2, ROWS, options=lambda: {"single_file_per_rank": False, "thread_count": 2}),
    "zstd": Kind(1, dtypes, options=lambda: {"_extensions": [ZStandard()]}, fallback=None),
    "async": Kind(2, ROWS, EVERY_WAY, save=dcp.async_save),
    "strided": Kind(1, strided, fallback=1),
    "quantized": Kind(1, quantized, fallback=4),
    "values": Kind(1, values, tensors=False),
    "paths": Kind(1, paths, tensors=False),
    "rows": Kind(4, ROWS, EVERY_WAY),
    "columns": Kind(3, COLUMNS, EVERY_WAY),
    "mesh": Kind(4, sharded(Shard(0), Shard(1), mesh=(2, 2)), EVERY_WAY),
    "replicas": Kind(4, sharded(Replicate(), Shard(0), mesh=(2, 2)), EVERY_WAY),
    "shards": Kind(2, maker({"even": (8, 4), "odd": (7, 5)}, shards)),
    "checkpointable": Kind(2, maker(FILLED, checkpointable), {"whole": (1, maker(FILLED, whole))}, since=(2, 14)),
    "training": Kind(
        4,
        lambda stored: training(stored, spread=True),
        {
            "by 2": (2, lambda stored: training(stored, spread=True)),
            "whole": (1, lambda stored: training(stored, spread=False)),
        },
    ),
    "plans": Kind(2, ROWS, EVERY_WAY, add=add_plans),
}
