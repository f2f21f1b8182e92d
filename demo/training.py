"""The training state of the demo: what each rank holds of it, and how two such states are compared.

Every tensor's values follow from its name alone, so any rank of any mesh can tell what it should hold.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

State = dict[str, Any]
# Makes one rank's part of the tensor with this name, shape and dtype.
Make = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]

LAYERS = 8
BYTES_PER_WEIGHT = 2 + 4 + 4  # bfloat16, and two float32 moments
NORM = "norm"


def weight_shapes(megabytes: float) -> dict[str, tuple[int, ...]]:
    """A decoder-only transformer whose weights and optimizer state take about that much."""
    # The embedding has about 8 h^2 weights and each layer 12 h^2.
    hidden = max(1, round(math.sqrt(megabytes * 1e6 / BYTES_PER_WEIGHT / (8 + 12 * LAYERS)) / 16)) * 16
    # An odd vocabulary: no number of ranks but one gets equal shards of it.
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (8 * hidden + 3, hidden)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.{NORM}.weight": (hidden,),
            f"layers.{layer}.attention.qkv.weight": (3 * hidden, hidden),
            f"layers.{layer}.attention.qkv.bias": (3 * hidden,),
            f"layers.{layer}.attention.out.weight": (hidden, hidden),
            f"layers.{layer}.mlp.up.weight": (4 * hidden, hidden),
            f"layers.{layer}.mlp.down.weight": (hidden, 4 * hidden),
        }
    return shapes


def build(megabytes: float, part: Make, plain: Make, *, trained: bool) -> State:
    """The state dict: ``part`` makes what is sharded or replicated over the mesh, ``plain`` the ordinary tensors.

    Non-tensor entries have their true values if ``trained``, else those of a fresh start.
    """
    shapes = weight_shapes(megabytes)
    return {
        "model": {name: part(f"model.{name}", shape, torch.bfloat16) for name, shape in shapes.items()}
        | {"rotary.frequencies": plain("rotary.frequencies", (64,), torch.float32)},
        "optimizer": {
            "state": {
                name: {
                    "exp_avg": part(f"exp_avg.{name}", shape, torch.float32),
                    "exp_avg_sq": part(f"exp_avg_sq.{name}", shape, torch.float32),
                    "step": 1000 if trained else 0,
                }
                for name, shape in shapes.items()
            },
            "group": {"lr": 3e-4 if trained else 0.0, "betas": (0.9, 0.95) if trained else (0.0, 0.0)},
            "updates": plain("updates", (), torch.int64),
        },
        "loader": {
            "epoch": 3 if trained else 0,
            "shard_name": "books-017" if trained else "",
            "random_state": plain("random_state", (5056,), torch.uint8),
        },
        "step": 1000 if trained else 0,
    }


def full_values(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if not dtype.is_floating_point:
        return torch.randint(0, 256, shape, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    values.view(-1)[0] = math.nan  # equal only to a comparison of bits
    return values


def zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # torch.zeros would leave the memory untouched, and the first load would pay for it.
    return torch.empty(shape, dtype=dtype).zero_()


def on_mesh(mesh: DeviceMesh, matrix_dim: int, make: Make) -> Make:
    """Matrices are sharded along ``matrix_dim``, norms are replicated, other vectors are sharded."""

    def part(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        placement: Placement = Replicate() if NORM in name else Shard(matrix_dim if len(shape) > 1 else 0)
        full = make(name, shape, dtype)
        local = full
        if isinstance(placement, Shard):
            chunks = full.chunk(mesh.size(), placement.dim)
            local = chunks[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        return DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=full.stride()
        )

    return part


def differences(left: State, right: State) -> tuple[list[str], int, int]:
    """The names of the entries that differ, and how many tensors and other entries were compared."""
    ours, theirs = dict(_leaves(left)), dict(_leaves(right))
    differing = sorted(ours.keys() ^ theirs.keys())
    tensors = others = 0
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            tensors += 1
            same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        else:
            others += 1
            same = type(a) is type(b) and bool(a == b)
        if not same:
            differing.append(name)
    return differing, tensors, others


def local_bytes(state: State) -> int:
    return sum(value.nbytes for _, value in _leaves(state) if isinstance(value, torch.Tensor))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value.to_local() if isinstance(value, DTensor) else value


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
