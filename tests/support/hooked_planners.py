"""Planners with hooks, and a checkpoint that shows in which order they are called."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from helpers import Entry, ShardedBuffer, fill, image, write_checkpoint
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast

__all__ = [
    "WHOLE",
    "Doubling",
    "Elsewhere",
    "OtherDtype",
    "Recording",
    "Scratch",
    "assert_one_at_a_time",
    "mixed_state",
    "write_mixed",
]

WHOLE = fill((12, 9), torch.int32)

Call = tuple[str, Any, Any]


def write_mixed(path: Path, half: torch.Tensor) -> Path:
    """Tensors of several chunks whose records lie in several files, out of order, between values.

    Args:
        path: where the checkpoint goes.
        half: one of its tensors, (6, 2) of float16, which is loaded into float32.
    """
    chunks = [((i, j), WHOLE[i : i + 5, j : j + 4].clone()) for j in (0, 4, 8) for i in (5, 0, 10)]
    return write_checkpoint(
        path,
        {
            "z": Entry((12, 9), torch.int32, chunks, file="__%d_0.distcp"),
            "value": Entry(value=5, file="__2_0.distcp"),
            "half": Entry.of(half, file="__0_0.distcp"),
            "old": Entry.of(fill((3,), torch.float32), file="__4_0.distcp", legacy=True),
            "a": Entry.of(fill((4,), torch.float64), file="__2_0.distcp"),
        },
    )


def mixed_state(device: torch.device | None = None) -> dict[str, Any]:
    """A state dict to load it into: in other chunks, and with a conversion."""
    parts = [((0, 2), (7, 5)), ((7, 0), (5, 9)), ((0, 7), (7, 2))]
    shards = [torch.zeros(sizes, dtype=torch.int32, device=device) for _, sizes in parts]
    return {
        "a": torch.zeros(4, dtype=torch.float64, device=device),
        "half": torch.zeros(6, 2, device=device),
        "old": torch.zeros(3, device=device),
        "value": 0,
        "z": ShardedBuffer.make((12, 9), [at for at, _ in parts], shards),
    }


class Recording:
    """Mixed into a planner: notes which hooks are called, and with what."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[Call] = []

    def note(self, name: str, item: Any) -> None:
        index = item.dest_index if isinstance(item, ReadItem) else item
        source = (item.storage_index, item.storage_offsets, item.lengths) if isinstance(item, ReadItem) else None
        self.calls.append((name, (index.fqn, index.offset, index.index), source))

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.note("resolve", item)
        return super().resolve_tensor(item)  # type: ignore[misc]

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        self.note("lookup", index)
        return super().lookup_tensor(index)  # type: ignore[misc]

    def transform_tensor(self, item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        self.note("transform", item)
        return super().transform_tensor(item, tensor)  # type: ignore[misc]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.note("commit", item)
        self.calls.append(("committed", image(tensor), None))
        super().commit_tensor(item, tensor)  # type: ignore[misc]

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.note("bytes", item)
        self.calls.append(("value", value.getvalue(), value.tell()))
        super().load_bytes(item, value)  # type: ignore[misc]


def assert_one_at_a_time(calls: list[Call]) -> None:
    """Each item was committed before the next one was resolved."""
    names = [name for name, _, _ in calls if name in {"resolve", "commit", "bytes"}]
    assert names.count("resolve") > 10
    for before, after in itertools.pairwise(names):
        assert (before == "resolve") == (after == "commit")


class Doubling(dcp.DefaultLoadPlanner):
    """Loads into temporaries and copies twice the values to where they belong."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        return torch.empty_like(self.target)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor * 2)


class Scratch(dcp_fast.DefaultLoadPlanner):
    """One scratch buffer for all items: each must be committed before the next one is resolved."""

    scratch: torch.Tensor | None = None
    scratch_bytes = 1 << 14

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        if self.scratch is None:
            self.scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.target.device)
        size = self.target.numel() * self.target.itemsize
        return self.scratch[:size].view(self.target.dtype).view(self.target.shape)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        assert self.scratch is not None
        assert tensor.data_ptr() == self.scratch.data_ptr()
        self.target.copy_(tensor)
        self.scratch.fill_(255)


class OtherDtype(dcp.DefaultLoadPlanner):
    """Loads into host memory in double precision, and flips the order of the elements on the way."""

    def transform_tensor(self, item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        self.target = super().transform_tensor(item, tensor)
        return torch.zeros(self.target.shape, dtype=torch.float64)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor.flip(list(range(tensor.dim()))))


class Elsewhere(dcp_fast.DefaultLoadPlanner):
    """Puts everything into tensors that the state dict does not hold."""

    def set_up_planner(self, state_dict: STATE_DICT_TYPE, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.loaded: dict[str, torch.Tensor] = {}
        state_dict["elsewhere"] = self.loaded

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        key = f"{index.fqn} {index.offset}"
        return self.loaded.setdefault(key, torch.zeros_like(super().lookup_tensor(index)))
