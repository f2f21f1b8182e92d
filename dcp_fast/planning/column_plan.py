"""A load plan as columns: its ReadItems are made when somebody looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcp_fast import _native
from dcp_fast._torch import create_read_items
from dcp_fast.collector import paused_collection

__all__ = ["ColumnPlan", "PlannedBytes", "PlannedTensors", "bytes_item", "is_whole"]

_TENSOR = LoadItemType.TENSOR  # an enum's attributes are slow to get


_WHOLE_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_whole(value: object) -> bool:
    """Whether a value of a state dict can be nothing but a whole tensor, rather than a part of a global one.

    Attributes of its own may make any tensor a part (torch.distributed.checkpoint.protocol, since torch 2.14).
    """
    return type(value) in _WHOLE_TYPES and not value.__dict__


@dataclass
class PlannedTensors(Sequence[ReadItem]):
    """The ReadItems of tensors.

    Attributes:
        columns: of the metadata that was planned with.
        boxes: one for each item.
        fqns: of each request.
        wanted: the wanted chunks of each request; None for a tensor that is wanted whole, where it begins.
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
        """What names a wanted chunk, which has ``dims`` dimensions, in the state dict."""
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


class ColumnPlan(LoadPlan):
    """A LoadPlan to all code: whoever asks for ``items`` gets a list, which is the plan from then on."""

    tensors: PlannedTensors | None = None
    """All items of tensors, as long as nobody can have changed them."""

    others: Sequence[tuple[int, ReadItem | str]] = ()
    """The other items, each with the number of tensors' requests before it. Of a bytes entry: its FQN."""

    @classmethod
    def of(cls, tensors: PlannedTensors, others: Sequence[tuple[int, ReadItem | str]]) -> ColumnPlan:
        plan = cls([])
        plan.tensors, plan.others = tensors, others
        return plan

    @property
    def items(self) -> list[ReadItem]:
        if self.tensors is not None:
            with paused_collection():
                self._items = self._make_items(self.tensors)
            self.tensors = None
        return self._items

    @items.setter
    def items(self, items: list[ReadItem]) -> None:
        self.tensors = None
        self._items = items

    def _make_items(self, tensors: PlannedTensors) -> list[ReadItem]:
        items: list[ReadItem] = []
        box = tensors.boxes.box
        at, count = 0, len(tensors)
        for before, other in self.others:
            while at < count and (fields := box(at))[0] < before:
                items.append(tensors._make(*fields))
                at += 1
            items.append(bytes_item(other) if isinstance(other, str) else other)
        return items + tensors[at:]

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, LoadPlan):
            return NotImplemented
        mine, others = ((plan.items, plan.storage_data, plan.planner_data) for plan in (self, other))
        return mine == others

    __hash__ = None  # type: ignore[assignment]  # as of every dataclass that can be compared

    def __reduce__(self) -> Any:
        # Whoever gets it need not have dcp_fast.
        return LoadPlan, (self.items, self.storage_data, self.planner_data)
