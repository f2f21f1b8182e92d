"""Adam state and a model's state dict, in the form that FSDP yields under ``SHARDED_STATE_DICT``.

Nothing is trained: what a loader sees of such state is its names, its sharding and its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor

OPTIMIZER_KEY = "optim"
MOMENTS = ("exp_avg", "exp_avg_sq")

Shapes = Mapping[str, tuple[int, ...]]


def payload_bytes(parameters: Shapes) -> int:
    """Bytes of the moments of all parameters; the steps, four bytes for each parameter, are left out."""
    return sum(math.prod(shape) for shape in parameters.values()) * len(MOMENTS) * torch.float32.itemsize


def adam_state(parameters: Shapes, generator: torch.Generator) -> dict[str, Any]:
    """This rank's part of ``{OPTIMIZER_KEY: FSDP.optim_state_dict(model, optimizer)}``, filled at random."""
    state: dict[str, dict[str, Any]] = {}
    for name, shape in parameters.items():
        state[name] = {moment: _sharded_by_rows(shape) for moment in MOMENTS}
        for tensor in local_tensors(state[name]):
            tensor.normal_(generator=generator)
        state[name]["step"] = torch.tensor(1.0)
    # Asking torch for the group's options keeps them those of a real Adam.
    (group,) = torch.optim.Adam([torch.nn.Parameter(torch.empty(1))]).param_groups
    return {OPTIMIZER_KEY: {"state": state, "param_groups": [{**group, "params": list(parameters)}]}}


def model_state(parameters: Shapes) -> dict[str, Any]:
    """This rank's part of ``model.state_dict()``; what it holds is never looked at."""
    return {name: _sharded_by_rows(shape) for name, shape in parameters.items()}


def differences(first: object, second: object, path: tuple[object, ...] = ()) -> Iterator[str]:
    """The paths at which two optimizer state dicts differ, in type, sharding or any bit."""
    same = type(first) is type(second)
    if same and isinstance(first, dict) and isinstance(second, dict):
        same = list(first) == list(second)
        for key in first.keys() & second.keys():
            yield from differences(first[key], second[key], (*path, key))
    elif same and isinstance(first, list) and isinstance(second, list):
        same = len(first) == len(second)
        for index, (left, right) in enumerate(zip(first, second, strict=False)):
            yield from differences(left, right, (*path, index))
    elif same and isinstance(first, ShardedTensor) and isinstance(second, ShardedTensor):
        places = [[shard.metadata for shard in tensor.local_shards()] for tensor in (first, second)]
        same = first.metadata() == second.metadata() and places[0] == places[1]
        pairs = zip(local_tensors(first), local_tensors(second), strict=False)
        same = same and all(_same_bits(left, right) for left, right in pairs)
    elif same and isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = _same_bits(first, second)
    elif same:
        same = first == second
    if not same:
        yield ".".join(map(str, path))


def local_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every plain tensor that this rank holds somewhere in a state dict."""
    if isinstance(value, ShardedTensor):  # which is a torch.Tensor too
        yield from (shard.tensor for shard in value.local_shards())
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        items: Iterable[object] = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from local_tensors(item)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.dtype, first.shape, first.stride()) != (second.dtype, second.shape, second.stride()):
        return False
    # As integers: a NaN equals itself, and zeros of either sign differ.
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


def _sharded_by_rows(shape: tuple[int, ...]) -> ShardedTensor:
    """Chunked by FSDP's own function. The whole tensor is only made to be chunked, and its memory never touched."""
    return _create_chunk_sharded_tensor(
        torch.empty(shape), dist.get_rank(), dist.get_world_size(), num_devices_per_node=1, pg=_get_default_group()
    )
