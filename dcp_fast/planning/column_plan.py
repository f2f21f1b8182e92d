"""A load plan in columns. Its ReadItems are made when somebody asks for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_fast import _native
from dcp_fast.collector import paused_collection

__all__ = ["ColumnPlan", "PlannedTensors", "in_plan_order"]

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
            return [self._make(*self.boxes.box(i)) for i in range(*at.indices(len(self)))]
        return self._make(*self.boxes.box(at))

    def _make(
        self,
        request: int,
        wanted: int,
        stored: int,
        stored_offsets: Sequence[int],
        storage_offsets: Sequence[int],
        dest_offsets: Sequence[int],
        lengths: Sequence[int],
    ) -> ReadItem:
        return ReadItem(
            _TENSOR,
            self.destination(request, wanted, len(lengths)),
            torch.Size(dest_offsets),
            MetadataIndex(self.fqns[request], stored_offsets, stored),
            torch.Size(storage_offsets),
            torch.Size(lengths),
        )

    def destination(self, request: int, wanted: int, dims: int) -> MetadataIndex:
        """The index that names a wanted chunk of a request in the state dict.

        Args:
            request, wanted: numbers of the request, and of the chunk among those that it wants.
            dims: how many dimensions the chunk has.
        """
        chunks = self.wanted[request]
        return MetadataIndex(self.fqns[request], (0,) * dims if chunks is None else chunks[wanted].offsets, wanted)


def in_plan_order(
    tensors: PlannedTensors,
    byte_items: Sequence[tuple[int, ReadItem]],
    of_tensors: Sequence[T],
    of_bytes: Sequence[T],
) -> list[T]:
    """Values of all items of a plan, in the plan's order.

    Args:
        tensors, byte_items: of the plan, as in :class:`ColumnPlan`.
        of_tensors, of_bytes: a value for each of these.
    """
    requests = range(len(tensors))
    merged: list[T] = []
    begin = 0
    for (before, _), value in zip(byte_items, of_bytes, strict=True):
        end = bisect_left(requests, before, begin, key=lambda item: tensors.boxes.box(item)[0])
        merged += of_tensors[begin:end]
        merged.append(value)
        begin = end
    return merged + list(of_tensors[begin:])


class ColumnPlan(LoadPlan):
    """A LoadPlan in columns. Once somebody has asked for its ``items``, the list that they got is the plan."""

    tensors: PlannedTensors | None = None
    """All items of tensors, as long as nobody can have changed them."""

    byte_items: Sequence[tuple[int, ReadItem]] = ()
    """The items of bytes entries, each with the number of requests for tensors that the state dict has before it."""

    @classmethod
    def of(cls, tensors: PlannedTensors, byte_items: Sequence[tuple[int, ReadItem]]) -> ColumnPlan:
        plan = cls([])
        plan.tensors, plan.byte_items = tensors, byte_items
        return plan

    @property
    def items(self) -> list[ReadItem]:
        if self.tensors is not None:
            with paused_collection():
                byte_items = [item for _, item in self.byte_items]
                self._items = in_plan_order(self.tensors, self.byte_items, self.tensors[:], byte_items)
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
