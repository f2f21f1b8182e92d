"""The translation between a tensor-parallel slice and the stored tensor that it is a slice of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from dcp_fast._torch import LocalShard, ShardedTensor, disabled_torch_function


class SlicedShardedTensor(torch.Tensor):
    """Presents a ShardedTensor that is a slice of a stored tensor as a part of that whole tensor.

    In the 2-D layout a parameter's optimizer state is a ShardedTensor over the data-parallel ranks, whose offsets count
    from the start of this rank's tensor-parallel slice. The checkpoint knows only the whole tensor. So the state dict
    that is loaded has an object of this class in place of the ShardedTensor. It has the size of the whole tensor, and
    its chunks have their offsets in the whole tensor. Planners and readers ask for chunks by the protocol that DCP
    defines for tensors (``__create_chunk_list__`` and ``__get_tensor_shard__``, in planner_helpers.py and utils.py of
    torch/distributed/checkpoint), so that any planner and any reader work with it.

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
        # It has a size but no memory. To compute with it is an error: see __torch_dispatch__.
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
