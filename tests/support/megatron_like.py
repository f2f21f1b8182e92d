"""A framework that loads as Megatron-Core does: planner and reader derived from torch's, tensors as ShardedTensors.

Imports torch alone, so that a process may import it before dcp_fast, after it or without it. What it takes from torch,
it takes when it is imported.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load, load_state_dict
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

__all__ = ["FLOAT8", "SHAPES", "SWAPS", "WAYS", "CachedReader", "Planner", "empty_state", "local_values"]

# Whole tensors of a small model; the state of the optimizer is named after them.
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "decoder.layers.0.attention.weight": ((18, 64), torch.bfloat16),
    "decoder.layers.1.attention.weight": ((18, 64), torch.bfloat16),
    "decoder.final_norm.weight": ((65,), torch.bfloat16),
    "embedding.weight": ((21, 32), torch.bfloat16),
    **{
        f"optimizer.state.{part}.decoder.layers.{layer}.attention.weight": ((18, 64), torch.float32)
        for part in ("exp_avg", "exp_avg_sq", "fp32_param")
        for layer in range(2)
    },
    "decoder.layers.0.mlp.weight": ((12, 10), torch.float8_e4m3fn),
    "decoder.layers.1.mlp.weight": ((12, 10), torch.float8_e4m3fn),
}
FLOAT8 = tuple(name for name, (_, dtype) in SHAPES.items() if dtype is torch.float8_e4m3fn)
# The vocabulary is padded to what divides by the ranks, so that the model has rows that no file has.
PADDED = {"embedding.weight": torch.Size([24, 32])}

# Items that planners gave temporaries. Not of a planner, lest a count be what changes it.
SWAPS: list[ReadItem] = []


class CachedReader(FileSystemReader):
    """Reads metadata once for all readers of a checkpoint."""

    cached: ClassVar[dict[str, Metadata]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        key = str(self.path)
        if key not in self.cached:
            self.cached[key] = super().read_metadata(*args, **kwargs)
        return self.cached[key]


class Planner(DefaultLoadPlanner):
    """Checks the shapes of a model, loads padded tensors, and gives float8 tensors contiguous memory.

    Args:
        expected: the sizes that tensors of the checkpoint must have, by name.
        padded: the sizes in the model of tensors whose size may differ.
    """

    def __init__(self, expected: Mapping[str, torch.Size], padded: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.expected = expected
        self.padded = padded
        self.swapped: tuple[ReadItem, torch.Tensor] | None = None

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name, size in self.expected.items():
            stored: Any = self.metadata.state_dict_metadata[name]
            if stored.size != size:
                raise ValueError(f"{name} is {stored.size} in the checkpoint, and {size} in the model")
        with self.sizes_of_the_model():
            return super().create_local_plan()

    @contextmanager
    def sizes_of_the_model(self) -> Iterator[None]:
        """Let the metadata say the sizes of the model, which torch compares with it."""
        assert self.metadata is not None
        entries: dict[str, Any] = {name: self.metadata.state_dict_metadata[name] for name in self.padded}
        sizes = {name: entry.size for name, entry in entries.items()}
        try:
            for name, entry in entries.items():
                entry.size = self.padded[name]
            yield
        finally:
            for name, entry in entries.items():
                entry.size = sizes[name]

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target: torch.Tensor = super().resolve_tensor(read_item)
        if target.dtype is not torch.float8_e4m3fn or target.is_contiguous():
            return target
        self.swapped = read_item, target
        SWAPS.append(read_item)
        return torch.empty(target.shape, dtype=target.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        if self.swapped is not None:
            item, target = self.swapped
            assert item is read_item, "an item is committed right after it is resolved"
            target.copy_(tensor)
            tensor, self.swapped = target, None
        super().commit_tensor(read_item, tensor)


# States of a rank of two, which have other parts than the three ranks that saved.


def empty_state(rank: int, names: Iterable[str], values: Iterable[str] = ()) -> dict[str, Any]:
    """What a rank of two loads into: columns, or halves of vectors and of the padded rows.

    Args:
        rank: 0 or 1.
        names: tensors of SHAPES.
        values: entries that are no tensors.
    """
    state: dict[str, Any] = {}
    for name in names:
        size, dtype = SHAPES[name]
        size = tuple(PADDED.get(name, size))
        dim = 0 if len(size) == 1 or name in PADDED else 1
        middle = (size[dim] + 1) // 2
        parts = []
        for begin, end, place in ((0, middle, 0), (middle, size[dim], 1)):
            offsets, sizes = [0] * len(size), list(size)
            offsets[dim], sizes[dim] = begin, end - begin
            # Where the parts of other ranks are does not matter to the load of this one.
            parts.append(ShardMetadata(offsets, sizes, "rank:0/cpu" if place == rank else "cpu"))
        own = Shard(torch.zeros(parts[rank].shard_sizes, dtype=dtype), parts[rank])
        whole = ShardedTensorMetadata(parts, torch.Size(size), TensorProperties(dtype=dtype))
        state[name] = ShardedTensor._init_from_local_shards_and_global_metadata([own], whole)
    return {**state, **{name: io.BytesIO() for name in values}}


def local_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """A loaded state with the tensors of this rank in the place of sharded ones."""
    return {
        name: value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
        for name, value in state.items()
    }


# Ways to load with torch's names, which are taken now.


def planner_for(state: Mapping[str, Any]) -> Planner:
    expected = {name: torch.Size(SHAPES[name][0]) for name in state if name in SHAPES and name not in PADDED}
    return Planner(expected, {name: size for name, size in PADDED.items() if name in state})


def load_as_megatron(state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's function is deprecated
        load_state_dict(state, CachedReader(path), planner=planner_for(state))


KEPT: dict[str, Any] = {"load": load, "reader": FileSystemReader}


class Strategy:
    reader = CachedReader
    load = staticmethod(load)

    @classmethod
    def run(cls, state: dict[str, Any], path: Path) -> None:
        cls.load(state, storage_reader=cls.reader(path), planner=planner_for(state))


def load_by_default(
    state: dict[str, Any],
    path: Path,
    function: Callable[..., None] = load,
    reader: type[FileSystemReader] = FileSystemReader,
) -> None:
    function(state, storage_reader=reader(path), planner=planner_for(state))


WAYS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "as Megatron-Core": load_as_megatron,
    "functions in a dict": lambda state, path: KEPT["load"](
        state, storage_reader=KEPT["reader"](path), planner=planner_for(state)
    ),
    "class attributes": Strategy.run,
    "defaults": load_by_default,
}
