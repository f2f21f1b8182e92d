"""What optimizer state is loaded into: tensors sharded as torch's loader or as the model's parameters are.

Only this rank's shard of a tensor is ever allocated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dcp_fast._torch import (
    ChunkShardingSpec,
    LocalShard,
    ShardedTensor,
    ShardedTensorMetadata,
    ShardProperties,
    gen_rank_device,
    get_device_module,
    get_object_coll_device,
)
from dcp_fast.errors import OptimizerStateError
from dcp_fast.optimizer.sliced import SlicedShardedTensor
from dcp_fast.planning.search import global_size

# The attributes that make a plain tensor a CheckpointableTensor, a part of a global one (torch 2.14).
_PARTS_OF_CHECKPOINTABLE = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


@dataclass(frozen=True)
class ParameterSlice:
    """This rank's tensor-parallel slice of a parameter, and the data-parallel ranks that it is sharded over.

    Attributes:
        offsets: of the slice in the parameter, in elements.
        sizes: of the slice; 0 along the split dimensions on a rank that has no slice.
        parameter_size: of the whole parameter.
        group: the data-parallel ranks.
    """

    offsets: tuple[int, ...]
    sizes: torch.Size
    parameter_size: torch.Size
    group: dist.ProcessGroup


def slices_of_parameters(model_state_dict: Mapping[str, Any]) -> dict[str, ParameterSlice]:
    """This rank's slices in the 2-D layout (FSDP + TP), from the state dict of an FSDP model; empty in any other.

    In that layout a tensor-parallel parameter is a nested ShardedTensor: the outer one's shard is this rank's
    tensor-parallel slice, and the inner one, the tensor of that shard, is sharded over the data-parallel ranks.

    Raises:
        OptimizerStateError: for more than one local shard of a nested ShardedTensor, and for nested DTensors.
    """
    slices: dict[str, ParameterSlice] = {}
    for fqn, value in model_state_dict.items():
        inner = _inner_of(fqn, value)
        if inner is not None:
            place = value.local_shards()[0].metadata
            slices[fqn] = ParameterSlice(
                tuple(place.shard_offsets), torch.Size(place.shard_sizes), global_size(value), inner._process_group
            )
    return slices


def may_lack_slices(model_state_dict: Mapping[str, Any], slices: Mapping[str, ParameterSlice]) -> bool:
    """Whether this rank must ask the others which of its ShardedTensors are tensor-parallel.

    A ShardedTensor without a local shard does not show whether it is nested. It is not if it is sharded over the
    data-parallel ranks.
    """
    if not slices:
        return True
    data_parallel = {tuple(dist.get_process_group_ranks(part.group)) for part in slices.values()}
    return any(
        tuple(dist.get_process_group_ranks(value._process_group)) not in data_parallel
        for value in model_state_dict.values()
        if type(value) is ShardedTensor and not value.local_shards()
    )


def data_parallel_group(
    model_state_dict: Mapping[str, Any], slices: Mapping[str, ParameterSlice], tensor_parallel: Collection[str]
) -> dist.ProcessGroup | None:
    """The ranks that state of parameters without a slice is sharded over; None for all ranks.

    As in torch they are the data-parallel group of the last parameter that has a slice. A rank without any slice takes
    the group of a parameter that is not tensor-parallel, which is sharded over the same ranks.

    Args:
        model_state_dict: of this rank.
        slices: of this rank.
        tensor_parallel: FQNs of the parameters of which any rank has a slice.
    """
    if slices:
        return list(slices.values())[-1].group
    if not tensor_parallel or not model_state_dict:
        return None
    for fqn, value in model_state_dict.items():
        if type(value) is ShardedTensor and fqn not in tensor_parallel:
            group: dist.ProcessGroup = value._process_group
            return group
    raise OptimizerStateError(
        "this rank has no slice of any tensor-parallel parameter and no other parameter, so that its data-parallel "
        f"ranks cannot be told: {', '.join(sorted(model_state_dict)[:20])}"
    )


def empty_slices(
    model_state_dict: Mapping[str, Any], tensor_parallel: Collection[str], group: dist.ProcessGroup | None
) -> dict[str, ParameterSlice]:
    """Slices without elements, by FQN, for the tensor-parallel parameters of which this rank holds nothing.

    Args:
        model_state_dict: of this rank.
        tensor_parallel: FQNs of the parameters of which any rank has a slice.
        group: the data-parallel ranks of this rank.
    """
    slices = {}
    for fqn in tensor_parallel:
        value = model_state_dict.get(fqn)
        if type(value) is not ShardedTensor or value.local_shards() or group is None:
            continue
        size = global_size(value)
        shards = value.metadata().shards_metadata
        split = [any(shard.shard_sizes[dim] != size[dim] for shard in shards) for dim in range(len(size))]
        if split and not any(split):  # another rank has it all
            split[0] = True
        sizes = torch.Size(0 if is_split else length for is_split, length in zip(split, size, strict=True))
        slices[fqn] = ParameterSlice((0,) * len(size), sizes, size, group)
    return slices


def _inner_of(fqn: str, value: object) -> ShardedTensor | None:
    if type(value) is DTensor and isinstance(value._local_tensor, (DTensor, ShardedTensor)):
        raise OptimizerStateError("cannot handle a nested DTensor", fqn=fqn)
    if type(value) is not ShardedTensor or not value.local_shards():
        return None
    inner = value.local_shards()[0].tensor
    if type(inner) is DTensor:
        raise OptimizerStateError("cannot handle a DTensor nested inside a ShardedTensor", fqn=fqn)
    if type(inner) is not ShardedTensor:
        return None
    if len(value.local_shards()) != 1:
        raise OptimizerStateError("cannot handle a nested ShardedTensor with more than one local shard", fqn=fqn)
    return inner


class RowSharding:
    """Tensors in equal chunks of rows over the ranks of a group, as torch's load_sharded_optimizer_state_dict has them.

    Args:
        group: the ranks; None for all. Ranks past the last row then hold no shard; those of a group hold an empty one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        device_type = get_object_coll_device(group)  # torch's function calls it by an older name, which is deprecated
        ranks = range(dist.get_world_size()) if group is None else dist.get_process_group_ranks(group)
        placements: list[Any] = [f"rank:{rank}/{gen_rank_device(rank, device_type)}" for rank in ranks]
        self._group = group
        self._rank = dist.get_rank()
        self._device = _device(device_type)
        self._spec = ChunkShardingSpec(dim=0, placements=placements)

    def whole(self, entry: TensorStorageMetadata) -> torch.Tensor:
        """A plain tensor of the whole size, on the device that the group works with."""
        return _allocate(entry, entry.size, self._device)

    def sharded(self, entry: TensorStorageMetadata, part: ParameterSlice | None = None) -> torch.Tensor:
        """A ShardedTensor of the size of the stored tensor, or of a slice of it."""
        properties = ShardProperties(
            dtype=entry.properties.dtype,
            layout=entry.properties.layout,
            requires_grad=entry.properties.requires_grad,
            memory_format=entry.properties.memory_format,
            pin_memory=entry.properties.pin_memory,
        )
        size = entry.size if part is None else part.sizes
        metadata = self._spec.build_metadata(torch.Size(size), properties)
        if self._group is None and size[0] > 0:
            metadata.shards_metadata = [shard for shard in metadata.shards_metadata if shard.shard_sizes[0] > 0]
        shards = []
        for shard in metadata.shards_metadata:
            # The spec lets an empty shard begin past the last row, which no ShardedTensor may.
            shard.shard_offsets[0] = min(shard.shard_offsets[0], size[0])
            placement = cast(Any, shard.placement)
            if placement.rank() == self._rank:
                shards.append(LocalShard(_allocate(entry, shard.shard_sizes, placement.device()), shard))
        made = ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=self._group)
        return made if part is None else SlicedShardedTensor(made, part.offsets, part.parameter_size)


def like_parameter(entry: TensorStorageMetadata, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor with the sharding, device and strides of a parameter, and the stored dtype.

    The parameter may be a DTensor, a ShardedTensor that is not nested, a CheckpointableTensor or a plain tensor.
    """
    if isinstance(parameter, DTensor):
        return DTensor.from_local(
            _empty_like(entry, parameter.to_local()),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.size(),
            stride=parameter.stride(),
        )
    if isinstance(parameter, ShardedTensor):
        like = parameter.metadata()
        properties = ShardProperties(dtype=entry.properties.dtype)
        metadata = ShardedTensorMetadata(like.shards_metadata, like.size, properties)
        shards = [LocalShard(_empty_like(entry, s.tensor), s.metadata) for s in parameter.local_shards()]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, metadata, process_group=parameter._process_group
        )
    made = _empty_like(entry, parameter)
    for name in _PARTS_OF_CHECKPOINTABLE:
        if hasattr(parameter, name):
            setattr(made, name, getattr(parameter, name))
    return made


def _empty_like(entry: TensorStorageMetadata, tensor: torch.Tensor) -> torch.Tensor:
    # Of a parameter on the meta device too: planners replace such tensors by real ones.
    return torch.empty_like(tensor.detach(), dtype=entry.properties.dtype)


def _device(device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, get_device_module(device_type).current_device())


def _allocate(entry: TensorStorageMetadata, size: Sequence[int], device: torch.device) -> torch.Tensor:
    properties = entry.properties
    return torch.empty(
        size,
        dtype=properties.dtype,
        layout=properties.layout,
        requires_grad=properties.requires_grad,
        pin_memory=properties.pin_memory,
        device=device,
    )
