"""The items of a load plan, as the transfer takes them: from its ReadItems, or from columns without making any."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from operator import itemgetter
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.serialization import LoadEndianness, get_default_load_endianness
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.errors import SizeMismatchError
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.planning.column_plan import ColumnPlan, PlannedBytes, PlannedTensors, in_plan_order
from dcp_fast.planning.values import TENSOR_TYPES
from dcp_fast.transfer.destinations import Destinations
from dcp_fast.transfer.record_rows import RecordRows
from dcp_fast.transfer.records import Records

T = TypeVar("T")

_BYTE_IO = LoadItemType.BYTE_IO  # an enum's attributes are slow to get


@dataclass
class BytesEntries:
    """The bytes entries of a plan.

    Attributes:
        items: as ReadItems.
        fqns: under which the planner has them.
        records: of each.
        transformed: the records that a transform was applied to.
    """

    items: Sequence[ReadItem]
    fqns: Sequence[str]
    records: Sequence[int]
    transformed: set[int]


@dataclass
class Resolved:
    """The items of tensors, and where they go.

    Attributes:
        items: as ReadItems.
        records: the record of each item.
        numbers: the destination of each item.
        rows: of the items, for ``_native.Program``.
        destinations: tensors by number.
        bytes_entries: all other items.
    """

    items: Sequence[ReadItem]
    records: Sequence[int]
    numbers: Sequence[int]
    rows: Buffer
    destinations: Destinations
    bytes_entries: BytesEntries

    def take(self, indices: Sequence[int]) -> list[ReadItem]:
        """Some of the items."""
        if isinstance(self.items, PlannedTensors):
            return self.items.take(indices)
        return [self.items[index] for index in indices]

    def target(self, index: int, item: ReadItem) -> torch.Tensor:
        """The tensor that is the box of an item in its destination, not one of the state dict itself."""
        tensor = self.destinations.tensors[self.numbers[index]]
        sizes, offsets, lengths = tensor.size(), item.dest_offsets, item.lengths
        if sizes == lengths or tensor.requires_grad or not len(sizes) == len(offsets) == len(lengths):
            return narrow_tensor_by_index(tensor.detach(), offsets, lengths)
        for dim, length in enumerate(lengths):
            if length < sizes[dim]:
                tensor = tensor.narrow(dim, offsets[dim], length)
        return tensor

    def fqns(self) -> list[str]:
        """The FQN of each item."""
        if isinstance(self.items, PlannedTensors):
            return [self.items.fqns[request] for request in self.items.boxes.requests]
        return [item.dest_index.fqn for item in self.items]


class Items(Protocol):
    """The items of a plan."""

    record_rows: RecordRows

    def resolve(self, state_dict: dict[str, Any]) -> Resolved:
        """Find all destinations in a state dict as torch's DefaultLoadPlanner has it."""

    def order(self) -> list[int]:
        """The items in the order in which torch loads them: file by file, within one as in the plan.

        Of a tensor it is the index among the items of tensors. Of a bytes entry it is the index among those, inverted
        bit by bit.
        """

    def in_order(self) -> list[tuple[ReadItem, int]]:
        """The items in the same order, and their records."""


def find_items(plan: LoadPlan, records: Records) -> Items:
    """The items of this rank's plan; in columns if plan and records come from the same metadata."""
    if isinstance(plan, ColumnPlan) and plan.tensors is not None:
        data = records.storage_data
        if isinstance(data, LazyDict) and data.untouched_columns is plan.tensors.columns:
            # None of them is an item: those are of tensors that the columns do not have.
            return _ColumnItems(plan.tensors, cast(Sequence[tuple[int, str]], plan.others), records)
    return _ListedItems(plan.items, records)


def box_of(item: ReadItem) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Offsets in the stored tensor and in the destination, and lengths, each with the same number of dimensions.

    An item may have more or fewer offsets than lengths. torch then uses as many dimensions as both have
    (narrow_tensor_by_index), and so does this function.

    Raises:
        SizeMismatchError: the box has other dimensions in the stored tensor than in the destination.
    """
    storage_offsets, dest_offsets, lengths = item.storage_offsets, item.dest_offsets, item.lengths
    dims = len(lengths)
    if len(storage_offsets) == dims and len(dest_offsets) == dims:
        return storage_offsets, dest_offsets, lengths
    stored_dims, dest_dims = min(len(storage_offsets), dims), min(len(dest_offsets), dims)
    if stored_dims != dest_dims:
        raise SizeMismatchError(
            f"an item has {len(storage_offsets)} storage offsets, {len(dest_offsets)} destination offsets and {dims} "
            "lengths",
            fqn=item.storage_index.fqn,
        )
    return storage_offsets[:stored_dims], dest_offsets[:stored_dims], lengths[:stored_dims]


def _by_file(items: Sequence[T], records: Sequence[int], rows: RecordRows) -> list[T]:
    """Items in the order of their files, within one in that of the plan."""
    files = rows.rows[::4]
    order = sorted(range(len(items)), key=list(map(files.__getitem__, records)).__getitem__)
    return [items[i] for i in order]


def _array(rows: _native.Rows) -> array[int]:
    return array("q", bytes(memoryview(rows).cast("B")))


def _nothing_native() -> bool:
    # The engine moves little-endian bytes as they are; where that may be wrong, torch swaps them.
    return sys.byteorder == "big" or get_default_load_endianness() == LoadEndianness.BIG


class _ListedItems:
    """Items that are there as objects."""

    def __init__(self, items: Sequence[ReadItem], records: Records) -> None:
        self._items = items
        # Records are told apart by the identity of these objects, so all must be alive meanwhile: some mappings make a
        # new object whenever they are asked.
        infos = [records.storage_data[item.storage_index] for item in items]
        numbers: dict[int, int] = {}
        self._records = [numbers.setdefault(id(info), len(numbers)) for info in infos]
        self.record_rows = RecordRows()
        all_fallback = _nothing_native()
        for item, record in zip(items, self._records, strict=True):
            if record == len(self.record_rows.fqns):  # its first item
                self.record_rows.add(item, records.place(item), all_fallback)

    def order(self) -> list[int]:
        boxes, entries = count(), count()
        numbers = [~next(entries) if item.type is _BYTE_IO else next(boxes) for item in self._items]
        return _by_file(numbers, self._records, self.record_rows)

    def in_order(self) -> list[tuple[ReadItem, int]]:
        return _by_file(list(zip(self._items, self._records, strict=True)), self._records, self.record_rows)

    def resolve(self, state_dict: dict[str, Any]) -> Resolved:
        destinations: list[torch.Tensor] = []
        known: dict[tuple[str, torch.Size | None, int | None], int] = {}
        rows: list[int] = []
        items: list[ReadItem] = []
        byte_items: list[ReadItem] = []
        byte_records: list[int] = []
        records: list[int] = []
        numbers: list[int] = []
        for item, record in zip(self._items, self._records, strict=True):
            if item.type is _BYTE_IO:
                byte_items.append(item)
                byte_records.append(record)
                continue
            index: MetadataIndex = item.dest_index
            key = (index.fqn, index.offset, index.index)
            number = known.get(key)
            if number is None:
                number = known[key] = len(destinations)
                destinations.append(find_state_dict_object(state_dict, index))
            storage_offsets, dest_offsets, lengths = box_of(item)
            rows += (record, number, len(lengths), *storage_offsets, *dest_offsets, *lengths)
            items.append(item)
            records.append(record)
            numbers.append(number)
        byte_fqns = [item.dest_index.fqn for item in byte_items]
        bytes_entries = BytesEntries(byte_items, byte_fqns, byte_records, self.record_rows.transformed)
        return Resolved(items, records, numbers, array("q", rows), Destinations(destinations), bytes_entries)


class _ColumnItems:
    """Items in columns, of which a ReadItem is only made where somebody needs the object."""

    def __init__(self, tensors: PlannedTensors, others: Sequence[tuple[int, str]], records: Records) -> None:
        self._tensors = tensors
        self._others = others
        self._planned = planned = tensors.boxes.find_records()
        if planned.missing is not None:
            raise KeyError(tensors[planned.missing].storage_index)
        fqns = [fqn for _, fqn in others]
        try:
            bytes_rows = _array(_native.bytes_rows(tensors.columns, fqns))
        except KeyError as error:
            raise KeyError(MetadataIndex(*error.args)) from None
        # Files in the plan's order. Where destinations share memory, it decides what is written last.
        names, requests = planned.files
        first_use = [(request, 1, name) for name, request in zip(names, requests, strict=True)]
        stored_files = tensors.columns.files() if fqns else []
        first_bytes: dict[int, int] = {}
        for (before, _), file in zip(others, bytes_rows[::4], strict=True):
            first_bytes.setdefault(file, before)
        first_use += [(before, 0, stored_files[file]) for file, before in first_bytes.items()]
        files = list(dict.fromkeys(name for *_, name in sorted(first_use, key=itemgetter(0, 1))))
        numbers = {name: number for number, name in enumerate(files)}
        payloads = planned.payloads()
        rows = _array(planned.rows(payloads is None and _nothing_native()))
        if files != names:
            rows[::4] = array("q", [numbers[names[file]] for file in rows[::4]])
        # A bytes entry is a record of its own, behind those of tensors.
        first = len(rows) // 4
        transformed = {first + i for i, is_transformed in enumerate(bytes_rows[3::4]) if is_transformed}
        bytes_rows[::4] = array("q", [numbers[stored_files[file]] for file in bytes_rows[::4]])
        bytes_rows[3::4] = array("q", [1]) * len(fqns)  # only their ranges are checked
        all_fqns = [*map(tensors.fqns.__getitem__, planned.requests), *fqns]
        self.record_rows = RecordRows(files, rows + bytes_rows, all_fqns, payloads)
        self.record_rows.transformed = transformed
        of_bytes = range(first, first + len(fqns))
        self._bytes_entries = BytesEntries(PlannedBytes(fqns), fqns, of_bytes, transformed)

    def order(self) -> list[int]:
        entries = [~entry for entry in range(len(self._others))]
        return self._by_file(range(len(self._tensors)), entries)

    def in_order(self) -> list[tuple[ReadItem, int]]:
        tensors, entries = self._tensors, self._bytes_entries
        boxes = list(zip(tensors[:], self._planned.of_box, strict=True))
        return self._by_file(boxes, list(zip(entries.items, entries.records, strict=True)))

    def _by_file(self, of_tensors: Sequence[T], of_entries: Sequence[T]) -> list[T]:
        planned = in_plan_order(self._tensors, self._others, of_tensors, of_entries)
        records = in_plan_order(self._tensors, self._others, self._planned.of_box, self._bytes_entries.records)
        return _by_file(planned, records, self.record_rows)

    def resolve(self, state_dict: dict[str, Any]) -> Resolved:
        tensors, boxes = self._tensors, self._tensors.boxes

        def find(request: int, wanted: int, dims: int) -> torch.Tensor:
            tensor: torch.Tensor = find_state_dict_object(state_dict, tensors.destination(request, wanted, dims))
            return tensor

        destinations = boxes.destinations(tensors.fqns, tensors.wanted, state_dict, TENSOR_TYPES, find)
        return Resolved(
            tensors,
            self._planned.of_box,
            boxes.destination_of_box,
            boxes.rows(self._planned),
            Destinations(destinations),
            self._bytes_entries,
        )
