"""What a plan asks for, as the transfer takes it: told from its ReadItems, or from columns without making any."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.serialization import LoadEndianness, get_default_load_endianness
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast.errors import SizeMismatchError
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.planning.column_plan import ColumnPlan, PlannedBytes, PlannedTensors, is_whole
from dcp_fast.transfer.destinations import Destinations
from dcp_fast.transfer.stored_entries import StoredEntries

__all__ = ["BytesEntries", "ColumnItems", "ListedItems", "Resolved", "box_of", "items_of"]

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


def items_of(plan: LoadPlan, storage: StoredEntries) -> ColumnItems | ListedItems:
    """The items of this rank's plan; in columns if those of plan and storage are the same."""
    if isinstance(plan, ColumnPlan) and plan.tensors is not None:
        data = storage.storage_data
        if isinstance(data, LazyDict) and data.untouched_columns is plan.tensors.columns:
            return ColumnItems(plan.tensors, cast(Sequence[tuple[int, str]], plan.others), storage)
    return ListedItems(plan.items, storage)


def box_of(item: ReadItem) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Offsets in the stored tensor and in the destination, and lengths, all of as many dimensions.

    narrow_tensor_by_index, with which torch takes a box out of a tensor, walks offsets and lengths in parallel as far
    as both go.
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


class _Records:
    """Rows for ``_native.read_layouts``: file, offset, length, whether only Python can read it."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.rows = array("q")
        self.fqns: list[str] = []
        self.transformed: set[int] = set()

    def add(self, item: ReadItem, info: Any, all_fallback: bool) -> None:
        file = self.files.setdefault(info.relative_path, len(self.files))
        if info.transform_descriptors:
            self.transformed.add(len(self.fqns))
        fallback = all_fallback or item.type is _BYTE_IO or bool(info.transform_descriptors)
        self.rows.extend((file, info.offset, info.length, fallback))
        self.fqns.append(item.storage_index.fqn)


def _nothing_native() -> bool:
    # The engine moves little-endian bytes as they are; where that may be wrong, torch swaps them.
    return sys.byteorder == "big" or get_default_load_endianness() == LoadEndianness.BIG


def _array(rows: _native.Rows) -> array[int]:
    return array("q", bytes(memoryview(rows).cast("B")))


class ListedItems:
    """The ReadItems of a plan.

    Attributes:
        paths: files that hold something of the plan.
        record_rows: for ``_native.read_layouts``, where each stored entry lies.
        record_fqns: of each stored entry.
        items: in the plan's order.
        records: the record of each item.
        record_files: the file of each record.
    """

    def __init__(self, items: Sequence[ReadItem], storage: StoredEntries) -> None:
        self.items = items
        # All are kept until records are told apart by identity: a mapping may make them as they are asked for.
        infos = [storage.storage_data[item.storage_index] for item in items]
        numbers: dict[int, int] = {}
        self.records = [numbers.setdefault(id(info), len(numbers)) for info in infos]
        records = _Records()
        all_fallback = _nothing_native()
        for item, info, record in zip(items, infos, self.records, strict=True):
            if record == len(records.fqns):  # its first item
                records.add(item, info, all_fallback)
        self.paths = list(map(storage.path, records.files))
        self.record_rows = records.rows
        self.record_fqns = records.fqns
        self.record_files = records.rows[::4]
        self._transformed = records.transformed

    def resolve(self, state_dict: dict[str, Any]) -> Resolved:
        """Find all destinations in a state dict as torch's DefaultLoadPlanner has it."""
        destinations = Destinations()
        known: dict[tuple[str, torch.Size | None, int | None], int] = {}
        rows: list[int] = []
        items: list[ReadItem] = []
        byte_items: list[ReadItem] = []
        byte_records: list[int] = []
        records: list[int] = []
        numbers: list[int] = []
        for item, record in zip(self.items, self.records, strict=True):
            if item.type is _BYTE_IO:
                byte_items.append(item)
                byte_records.append(record)
                continue
            index: MetadataIndex = item.dest_index
            key = (index.fqn, index.offset, index.index)
            number = known.get(key)
            if number is None:
                number = known[key] = destinations.add(find_state_dict_object(state_dict, index))
            storage_offsets, dest_offsets, lengths = box_of(item)
            rows += (record, number, len(lengths), *storage_offsets, *dest_offsets, *lengths)
            items.append(item)
            records.append(record)
            numbers.append(number)
        byte_fqns = [item.dest_index.fqn for item in byte_items]
        bytes_entries = BytesEntries(byte_items, byte_fqns, byte_records, self._transformed)
        return Resolved(items, records, numbers, array("q", rows), destinations, bytes_entries)


class ColumnItems:
    """The items of a plan in columns.

    Attributes:
        paths, record_rows, record_fqns: as in ListedItems.
    """

    def __init__(
        self, tensors: PlannedTensors, bytes_entries: Sequence[tuple[int, str]], storage: StoredEntries
    ) -> None:
        self._tensors = tensors
        self._planned = planned = tensors.boxes.find_records()
        if planned.missing is not None:
            raise KeyError(tensors[planned.missing].storage_index)
        fqns = [fqn for _, fqn in bytes_entries]
        try:
            bytes_rows = _array(_native.bytes_rows(tensors.columns, fqns))
        except KeyError as error:
            raise KeyError(MetadataIndex(*error.args)) from None
        # In the plan's order, which tells what is written last where destinations share memory.
        names, requests = planned.files
        first_use = [(request, 1, name) for name, request in zip(names, requests, strict=True)]
        stored_files = tensors.columns.files() if fqns else []
        first_bytes: dict[int, int] = {}
        for (before, _), file in zip(bytes_entries, bytes_rows[::4], strict=True):
            first_bytes.setdefault(file, before)
        first_use += [(before, 0, stored_files[file]) for file, before in first_bytes.items()]
        files = list(dict.fromkeys(name for *_, name in sorted(first_use, key=itemgetter(0, 1))))
        numbers = {name: number for number, name in enumerate(files)}
        rows = _array(planned.rows(_nothing_native()))
        if files != names:
            rows[::4] = array("q", [numbers[names[file]] for file in rows[::4]])
        first = len(rows) // 4
        records = range(first, first + len(fqns))
        transformed = {
            record for record, is_transformed in zip(records, bytes_rows[3::4], strict=True) if is_transformed
        }
        bytes_rows[::4] = array("q", [numbers[stored_files[file]] for file in bytes_rows[::4]])
        bytes_rows[3::4] = array("q", [1]) * len(fqns)  # only their ranges are checked
        rows += bytes_rows
        self._bytes_entries = BytesEntries(PlannedBytes(fqns), fqns, records, transformed)
        self.paths = list(map(storage.path, files))
        self.record_rows = rows
        self.record_fqns = [*map(tensors.fqns.__getitem__, planned.requests), *fqns]

    def resolve(self, state_dict: dict[str, Any]) -> Resolved:
        """As that of ListedItems."""
        tensors, boxes = self._tensors, self._tensors.boxes
        destinations = Destinations()
        fqns, chunks = tensors.fqns, tensors.wanted
        for request, wanted, dims in boxes.destinations():
            fqn = fqns[request]
            value: Any = state_dict[fqn] if chunks[request] is None and fqn in state_dict else None
            if not is_whole(value) or value.dim() != dims:
                value = find_state_dict_object(state_dict, tensors.destination(request, wanted, dims))
            destinations.add(value)
        return Resolved(
            tensors,
            self._planned.of_box,
            boxes.destination_of_box,
            boxes.rows(self._planned),
            destinations,
            self._bytes_entries,
        )
