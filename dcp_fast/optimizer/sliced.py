"""The translation between a tensor-parallel slice and the stored tensor that it is a slice of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from dcp_fast._torch import LocalShard, ShardedTensor, disabled_torch_function

__all__ = ["SlicedShardedTensor"]


class SlicedShardedTensor(torch.Tensor):
    """A ShardedTensor that is a slice of a stored tensor, as planners and readers are to see it.

    In the 2-D layout a parameter's optimizer state is a ShardedTensor over the data-parallel ranks, whose offsets count
    from the start of this rank's tensor-parallel slice. The checkpoint knows only the whole tensor. This stands in for
    the ShardedTensor in the state dict that is loaded: it has the size of the whole tensor, and its chunks have their
    offsets in it. It does so by the protocol that DCP itself defines for tensors (``__create_chunk_list__`` and
    ``__get_tensor_shard__``, torch/distributed/checkpoint/planner_helpers.py and utils.py), so that any planner and
    any reader work with it and the indices of its ReadItems are those of the whole tensor.

    Args:
        sharded: the slice; its local shards are what is loaded.
        offsets: of the slice in the stored tensor, in elements.
        size: of the stored tensor.
    """

    sharded: ShardedTensor
    offsets: tuple[int, ...]

    @staticmethod
    def __new__(cls, sharded: ShardedTensor, offsets: Sequence[int], size: Sequence[int]) -> SlicedShardedTensor:
        shards = sharded.local_shards()
        device = shards[0].tensor.device if shards else torch.device("cpu")
        # No memory belongs to it, only a size: whoever computes with it gets an error.
        made: SlicedShardedTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(size), dtype=sharded.dtype, device=device
        )
        made.sharded = sharded
        made.offsets = tuple(offsets)
        return made

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func}: a {cls.__name__} only says where its shards belong")

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(offsets={self.offsets}, size={tuple(self.size())}, sharded={self.sharded!r})"

    def _places(self) -> list[tuple[torch.Size, LocalShard]]:
        """The offsets in the stored tensor of every shard that holds anything."""
        places = []
        for shard in self.sharded.local_shards():
            if shard.tensor.numel() > 0:
                local = shard.metadata.shard_offsets
                places.append((torch.Size(map(sum, zip(self.offsets, local, strict=True))), shard))
        return places

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, torch.Size(shard.metadata.shard_sizes)) for at, shard in self._places()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for at, shard in self._places():
            if at == index.offset:
                return shard.tensor
        raise ValueError(f"could not find a shard at {index.offset} for FQN {index.fqn!r}")
