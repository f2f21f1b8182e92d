"""Units of the 2-D layout: which slices a model has, and the stand-in for a slice that planners and readers see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optimizer_cases import by_rows, check
from ranks import Ranks
from test_optimizer_2d import nested
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from dcp_fast.optimizer.sharding import data_parallel_group, empty_slices, may_lack_slices, slices_of_parameters
from dcp_fast.optimizer.sliced import SlicedShardedTensor

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def unit(size: tuple[int, int] = (3, 4)) -> ShardedTensor:
    return by_rows(torch.arange(size[0] * size[1], dtype=torch.float64).view(size))


def test_sliced_tensor_has_the_size_and_the_places_of_the_stored_one(gloo: None) -> None:
    sliced = SlicedShardedTensor(unit(), (5, 2), (1 << 40, 10))
    assert isinstance(sliced, torch.Tensor)
    assert sliced.size() == torch.Size((1 << 40, 10))
    assert sliced.dtype == torch.float64
    assert sliced.device == torch.device("cpu")
    assert sliced.__create_chunk_list__() == [ChunkStorageMetadata(torch.Size((5, 2)), torch.Size((3, 4)))]
    assert "offsets=(5, 2), size=(1099511627776, 10)" in repr(sliced)


def test_sliced_tensor_gives_its_shards_by_global_offset(gloo: None) -> None:
    sharded = unit()
    sliced = SlicedShardedTensor(sharded, (5, 2), (10, 10))
    shard = sharded.local_shards()[0].tensor
    for number in (None, 0, 7):  # the offset says it all
        assert sliced.__get_tensor_shard__(MetadataIndex("t", (5, 2), number)) is shard
    for offset in ((0, 0), (5, 3), None):
        with pytest.raises(ValueError, match=r"could not find a shard at .* for FQN 't'"):
            sliced.__get_tensor_shard__(MetadataIndex("t", offset, 0))


def test_sliced_tensor_without_elements_has_no_chunks(gloo: None) -> None:
    for size in ((0, 4), (3, 0)):
        sliced = SlicedShardedTensor(unit(size), (1, 1), (10, 10))
        assert sliced.__create_chunk_list__() == []
        with pytest.raises(ValueError, match="could not find"):
            sliced.__get_tensor_shard__(MetadataIndex("t", (1, 1), 0))


def test_sliced_tensor_of_several_shards(gloo: None) -> None:
    parts = [ShardMetadata([0, 0], [2, 3], "rank:0/cpu"), ShardMetadata([2, 0], [1, 3], "rank:0/cpu")]
    local = [LocalShard(torch.full(part.shard_sizes, float(i)), part) for i, part in enumerate(parts)]
    metadata = ShardedTensorMetadata(parts, torch.Size((3, 3)), TensorProperties(dtype=torch.float32))
    sharded = ShardedTensor._init_from_local_shards_and_global_metadata(local, metadata)
    sliced = SlicedShardedTensor(sharded, (4, 1), (9, 9))
    assert [tuple(chunk.offsets) for chunk in sliced.__create_chunk_list__()] == [(4, 1), (6, 1)]
    assert sliced.__get_tensor_shard__(MetadataIndex("t", (6, 1))) is local[1].tensor


def test_sliced_tensor_cannot_be_computed_with(gloo: None) -> None:
    sliced = SlicedShardedTensor(unit(), (5, 2), (10, 10))
    for compute in (lambda t: t + 1, lambda t: t.clone(), lambda t: t.zero_(), lambda t: t[0]):
        with pytest.raises(NotImplementedError, match="only says where its shards belong"):
            compute(sliced)


def test_model_without_slices(gloo: None) -> None:
    model = {"plain": torch.ones(2), "sharded": unit(), "text": "x", "none": None}
    assert slices_of_parameters(model) == {}


def test_slices_of_a_model(gloo: None) -> None:
    model = {"plain": torch.ones(2), "beside": unit(), "w": nested(torch.zeros(6, 8), [(0, 1, 0, 8)], None, None)}
    slices = slices_of_parameters(model)
    assert slices.keys() == {"w"}
    assert slices["w"].offsets == (0, 0)
    assert slices["w"].sizes == slices["w"].parameter_size == torch.Size((6, 8))
    assert slices["w"].group is dist.group.WORLD


def slices_on_two_ranks(path: Path) -> None:
    dp_groups = [dist.new_group([rank]) for rank in range(2)]
    mine = dp_groups[dist.get_rank()]
    model = {
        "columns": nested(torch.zeros(2, 7), [(0, 1, 0, 3), (1, 1, 3, 4)], mine, None),
        "second": nested(torch.zeros(5, 2), [(1, 0, 0, 5)], mine, None),
        "beside": by_rows(torch.zeros(3, 3), mine),
    }
    slices = slices_of_parameters(model)
    first = dist.get_rank() == 0
    assert list(slices) == (["columns"] if first else ["columns", "second"])
    assert may_lack_slices(model, slices) == first
    group = data_parallel_group(model, slices, ["columns", "second"])
    assert group is mine
    # A rank without slices goes by what is not tensor-parallel.
    assert data_parallel_group(model, {}, ["columns", "second"]) is mine
    assert data_parallel_group(model, {}, []) is None
    slices |= empty_slices(model, ["columns", "second"], group)
    assert list(slices) == ["columns", "second"]
    assert (slices["columns"].offsets, slices["columns"].sizes) == (((0, 0), (2, 3)) if first else ((0, 3), (2, 4)))
    assert slices["second"].offsets == (0, 0)
    assert slices["second"].sizes == ((0, 2) if first else (5, 2))
    assert slices["second"].parameter_size == (5, 2)
    assert all(found.group is mine for found in slices.values())


def test_slices_of_a_rank_that_holds_none(ranks: Ranks, tmp_path: Path) -> None:
    check(ranks, 2, [slices_on_two_ranks], tmp_path)
