"""The tensors that a workload loads into: one rank's shards, in memory that was touched before any timing.

The benchmark is a single process, so the mesh that its DTensors need is a fake one: a process group that never
communicates. Loads are called with ``no_dist``, as on one rank of a job whose ranks need not agree on anything.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import gpus
from benchmarks.checkpoints import Shapes

FAKE_RANKS = 64
POISON = 0xA5


@dataclass(frozen=True)
class Wanted:
    """What the loading rank wants: rank 0's shard along ``dim`` of ``ranks`` ranks, or all when ``dim`` is None.

    And where: whole tensors are spread over the devices, about as many bytes on each.
    """

    dim: int | None = None
    ranks: int = 1
    dtype: torch.dtype = torch.float32
    devices: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True)
class Destinations:
    """A state dict, and the plain tensors that its entries keep their data in."""

    state: dict[str, torch.Tensor]
    local: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.local.values())

    @property
    def gpus(self) -> set[torch.device]:
        return gpus.of(self.local.values())

    def poison(self) -> None:
        """Overwrite all tensors, so that a contender that leaves one out cannot pass for one that loads it.

        Where they lie: on a GPU this is work of that GPU.
        """
        for tensor in self.local.values():
            tensor.view(torch.uint8).fill_(POISON)
        gpus.wait_for(self.gpus)


def allocate(shapes: Shapes, wanted: Wanted) -> Destinations:
    state: dict[str, torch.Tensor] = {}
    local: dict[str, torch.Tensor] = {}
    mesh = None if wanted.dim is None else fake_mesh(wanted)
    held = dict.fromkeys(wanted.devices, 0)
    for name, shape in shapes.items():
        device = min(held, key=lambda device: held[device])
        if mesh is None or wanted.dim is None:
            state[name] = local[name] = torch.empty(shape, dtype=wanted.dtype, device=device)
            held[device] += local[name].nbytes
            continue
        # A vector has no columns: it is split along the only dimension that it has.
        dim = min(wanted.dim, len(shape) - 1)
        sizes = list(shape)
        sizes[dim] //= wanted.ranks
        assert sizes[dim] * wanted.ranks == shape[dim], f"{name}: {shape} does not divide over {wanted.ranks} ranks"
        local[name] = torch.empty(sizes, dtype=wanted.dtype, device=device)
        state[name] = DTensor.from_local(local[name], mesh, [Shard(dim)], run_check=False)
    destinations = Destinations(state, local)
    destinations.poison()
    return destinations


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A writable view of the tensor's own memory, which must be on the host. It keeps the tensor alive."""
    assert tensor.is_cpu
    assert tensor.is_contiguous()
    buffer: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    buffer.owner = tensor
    return memoryview(buffer).cast("B")


def fake_mesh(wanted: Wanted) -> DeviceMesh:
    """The mesh of the ranks that want something, of which this process is the first."""
    (device,) = wanted.devices  # a rank has its shards on one device
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=FAKE_RANKS)
    return DeviceMesh(torch.device(device).type, list(range(wanted.ranks)))
