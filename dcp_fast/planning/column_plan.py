"""A load plan in columns. Its ReadItems are made when somebody asks for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_fast import _native
from dcp_fast._torch import create_read_items
from dcp_fast.collector import paused_collection

T = TypeVar("T")

_TENSOR = LoadItemType.TENSOR  # an enum's attributes are slow to get


@dataclass
class PlannedTensors(Sequence[ReadItem]):
    """The ReadItems of tensors, as a sequence that makes an item when it is asked for.

    The search got one request for each tensor, and found boxes for it.

    Attributes:
        columns: of the metadata that was planned with.
        boxes: one for each item, in the order of the requests.
        fqns: of each request.
        wanted: the wanted chunks of each request; None for a tensor that is wanted whole.
    """

    columns: _native.MetadataColumns
    boxes: _native.PlannedBoxes
    fqns: list[str]
    wanted: list[Sequence[ChunkStorageMetadata] | None]

    def __len__(self) -> int:
        return len(self.boxes)

    @overload
    def __getitem__(self, at: int) -> ReadItem: ...
    @overload
    def __getitem__(self, at: slice) -> list[ReadItem]: ...
    def __getitem__(self, at: int | slice) -> ReadItem | list[ReadItem]:
        if isinstance(at, slice):
            return self.take(range(*at.indices(len(self))))
        return self.take([at])[0]

    def take(self, indices: Sequence[int]) -> list[ReadItem]:
        """Make the items of some indices.

        Raises:
            IndexError: there is no such item.
        """
        return self.boxes.items(indices, self.fqns, self.wanted, ReadItem, MetadataIndex, torch.Size, _TENSOR)

    def destination(self, request: int, wanted: int, dims: int) -> MetadataIndex:
        """The index that names a wanted chunk of a request in the state dict.

        Args:
            request, wanted: numbers of the request, and of the chunk among those that it wants.
            dims: how many dimensions the chunk has.
        """
        chunks = self.wanted[request]
        return MetadataIndex(self.fqns[request], (0,) * dims if chunks is None else chunks[wanted].offsets, wanted)


@dataclass
class PlannedBytes(Sequence[ReadItem]):
    """The ReadItems of bytes entries, by their FQNs."""

    fqns: Sequence[str]

    def __len__(self) -> int:
        return len(self.fqns)

    @overload
    def __getitem__(self, at: int) -> ReadItem: ...
    @overload
    def __getitem__(self, at: slice) -> list[ReadItem]: ...
    def __getitem__(self, at: int | slice) -> ReadItem | list[ReadItem]:
        if isinstance(at, slice):
            return list(map(bytes_item, self.fqns[at]))
        return bytes_item(self.fqns[at])


def bytes_item(fqn: str) -> ReadItem:
    """The ReadItem of a bytes entry."""
    (item,) = create_read_items(fqn, BytesStorageMetadata(), None)
    return item


def in_plan_order(
    tensors: PlannedTensors,
    others: Sequence[tuple[int, object]],
    of_tensors: Sequence[T],
    of_others: Sequence[T],
) -> list[T]:
    """Values of all items of a plan, in the plan's order.

    Args:
        tensors, others: of the plan, as in :class:`ColumnPlan`.
        of_tensors, of_others: a value for each of these.
    """
    if not others:
        return list(of_tensors)
    requests = tensors.boxes.requests
    merged: list[T] = []
    begin = 0
    for (before, _), value in zip(others, of_others, strict=True):
        end = bisect_left(requests, before, begin)
        merged += of_tensors[begin:end]
        merged.append(value)
        begin = end
    return merged + list(of_tensors[begin:])


class ColumnPlan(LoadPlan):
    """A LoadPlan in columns. Once somebody has asked for its ``items``, the list that they got is the plan."""

    tensors: PlannedTensors | None = None
    """All items of tensors, as long as nobody can have changed them."""

    others: Sequence[tuple[int, ReadItem | str]] = ()
    """The other items, each with the number of requests for tensors before it. Of a bytes entry: its FQN."""

    @classmethod
    def of(cls, tensors: PlannedTensors, others: Sequence[tuple[int, ReadItem | str]]) -> ColumnPlan:
        plan = cls([])
        plan.tensors, plan.others = tensors, others
        return plan

    @property
    def items(self) -> list[ReadItem]:
        if self.tensors is not None:
            with paused_collection():
                others = [bytes_item(other) if isinstance(other, str) else other for _, other in self.others]
                self._items = in_plan_order(self.tensors, self.others, self.tensors[:], others)
            self.tensors = None
        return self._items

    @items.setter
    def items(self, items: list[ReadItem]) -> None:
        self.tensors = None
        self._items = items

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, LoadPlan):
            return NotImplemented
        mine, others = ((plan.items, plan.storage_data, plan.planner_data) for plan in (self, other))
        return mine == others

    __hash__ = None  # type: ignore[assignment]  # as of every dataclass that can be compared

    def __reduce__(self) -> Any:
        # A process without dcp_fast can unpickle it.
        return LoadPlan, (self.items, self.storage_data, self.planner_data)
