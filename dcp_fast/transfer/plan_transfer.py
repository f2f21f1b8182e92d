"""Transfer: boxes x layouts x destinations, run by the native engine; torch places what the engine cannot."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch.autograd.graph import increment_version
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.collector import paused_collection
from dcp_fast.errors import CudaError, LoadError, SizeMismatchError, typed_errors
from dcp_fast.observe.report import LoadReport
from dcp_fast.planning.hooks import has_default_hooks
from dcp_fast.planning.planner import put_value
from dcp_fast.transfer.conversion import ConvertedBox, place_converted
from dcp_fast.transfer.destinations import DTYPES, Destinations
from dcp_fast.transfer.devices import device_of, refusals, served_device
from dcp_fast.transfer.gpu import CudaLoad, CudaRefusedError
from dcp_fast.transfer.rows import BytesEntries, ColumnItems, ListedItems, box_of, items_of
from dcp_fast.transfer.stored_entries import StoredEntries

__all__ = ["PlanTransfer"]

_MOST_DEVICES = 64  # of a process
# Figures of a report that an attempt counts, and one that is refused midway counts for nothing.
_COUNTED_ANEW = ("bytes_needed", "staged_items", "fallback_records", "device_fallback_items")

_BYTE_IO = LoadItemType.BYTE_IO  # an enum's attributes are slow to get


class PlanTransfer:
    """One run of a load plan.

    Args:
        plan: of this rank.
        planner: whose state dict is loaded.
        storage: the stored entries.
        options: for the native engine. It gets half of ``staging_bytes``; boxes that torch places get the other half.
        staging_bytes: host memory that bytes may pass through.
        cuda: brings bytes to destinations on GPUs.
        report: is filled in.
    """

    def __init__(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        storage: StoredEntries,
        options: _native.Options,
        staging_bytes: int,
        cuda: CudaLoad,
        report: LoadReport,
    ) -> None:
        self.planner = planner
        self.storage = storage
        self.options = options
        self.staging_bytes = staging_bytes
        self.report = report
        self.cuda = cuda
        self.plan = plan
        self.record_fqns: list[str] = []
        in_any_order = has_default_hooks(planner)
        with report.stage("layout"), paused_collection():
            self.items: ColumnItems | ListedItems = (
                items_of(plan, storage) if in_any_order else ListedItems(plan.items, storage)
            )
        self.layouts = self._read_layouts()
        self.in_any_order = in_any_order

    def run(self) -> None:
        """Load everything. Raises LoadError, and whatever the planner raises."""
        with typed_errors(self.record_fqns, self.storage.root):
            try:
                if not (self.in_any_order and self._place_at_once()):
                    self._place_one_by_one()
                self.cuda.finish()
            except BaseException:
                self.cuda.abort()
                raise

    # Layout

    def _read_layouts(self) -> _native.Layouts:
        self.record_fqns[:] = self.items.record_fqns
        with self.report.stage("layout"), typed_errors(self.record_fqns, self.storage.root):
            layouts = _native.read_layouts(self.items.paths, self.items.record_rows, self.options)
        self.report.records = len(layouts)
        self.report.requests += layouts.requests
        self.report.bytes_read += layouts.bytes_read
        return layouts

    # Placement

    def _place_at_once(self) -> bool:
        """Resolve all destinations, then place all tensors in any order that gives torch's result.

        Returns:
            False, with nothing done, if no such order can be told.
        """
        with self.report.stage("transfer"), paused_collection():
            resolved = self.items.resolve(self.planner.state_dict)  # type: ignore[attr-defined]
            destinations, numbers, items = resolved.destinations, resolved.numbers, resolved.items
            if not destinations.all_have_addresses:
                return False

            def target(i: int) -> torch.Tensor:
                tensor = destinations.tensors[numbers[i]].detach()
                return narrow_tensor_by_index(tensor, items[i].dest_offsets, items[i].lengths)

            self.cuda.keep(destinations.tensors)
            self._place(items, resolved.records, resolved.rows, destinations, target)
        with self.report.stage("commit"):
            self._load_all_bytes(resolved.bytes_entries)
        return True

    def _place_one_by_one(self) -> None:
        """For planners with hooks: resolve, place and commit each item before the next, in torch's order."""
        listed = self.items
        if not isinstance(listed, ListedItems):
            with self.report.stage("layout"), paused_collection():
                self.items = listed = ListedItems(self.plan.items, self.storage)
            self.layouts = self._read_layouts()
        for i in sorted(range(len(listed.items)), key=lambda i: listed.record_files[listed.records[i]]):
            item = listed.items[i]
            if item.type is _BYTE_IO:
                with self.report.stage("commit"):
                    self._load_bytes(item)
                continue
            with self.report.stage("commit"):
                tensor = self.planner.resolve_tensor(item).detach()
            with self.report.stage("transfer"):
                self._place_item(item, listed.records[i], tensor)
            with self.report.stage("commit"):
                self.planner.commit_tensor(item, tensor)

    def _place_item(self, item: ReadItem, record: int, tensor: torch.Tensor) -> None:
        # Here the destination is the box itself, so nothing of it may be left out.
        if any(length < size for length, size in zip(item.lengths, tensor.size(), strict=False)):
            reason = f"req {item.storage_index} mismatch sizes {tensor.size()} vs {item.lengths}"
            raise self.storage.error(SizeMismatchError, reason, item)
        storage_offsets, _, lengths = box_of(item)
        dims = len(lengths)
        rows = array("q", [record, 0, dims, *storage_offsets, *(0,) * dims, *lengths])
        destinations = Destinations()
        destinations.add(tensor)
        self._place([item], [record], rows, destinations, lambda _: tensor)

    def _place(
        self,
        items: Sequence[ReadItem],
        records: Sequence[int],
        rows: Buffer,
        destinations: Destinations,
        target: Callable[[int], torch.Tensor],
    ) -> None:
        report = self.report
        attempts_left = _MOST_DEVICES
        refused = True
        while refused:
            before = {name: getattr(report, name) for name in _COUNTED_ANEW}
            program = _native.Program(self.layouts, rows, destinations.column())
            report.bytes_needed += program.bytes_needed
            try:
                self._run(program, items, records, destinations, target)
                refused = False
            except CudaRefusedError as error:
                # A refusal is remembered, so that there is one for each device at the most; else somebody forgets them.
                attempts_left -= 1
                if attempts_left == 0:
                    raise CudaError(str(error)) from None
            if refused:
                # From the beginning, and without that device: what is in place already gets the same values again.
                self.cuda.give_up()
                vars(report).update(before)
                destinations = destinations.anew()

    def _run(
        self,
        program: _native.Program,
        items: Sequence[ReadItem],
        records: Sequence[int],
        destinations: Destinations,
        target: Callable[[int], torch.Tensor],
    ) -> None:
        try:
            for wave in range(program.waves):
                if destinations.devices:
                    stats = self.cuda.run(program, wave, self.options, destinations.devices)
                else:
                    stats = program.run(wave, self.options)
                self._count(stats)
                staged = [
                    self._converted_box(items[i], records[i], *program.box(i), target(i))
                    for i in program.converted(wave)
                ]
                if staged:
                    self._place_converted(staged)
                self._place_fallback([(items[i], records[i], target(i)) for i in program.fallback(wave)])
        finally:
            # What copy_ does: autograd must notice that these tensors are no longer what was saved for backward. After
            # an error nobody knows which of them were written.
            increment_version(destinations.tensors)

    def _converted_box(
        self, item: ReadItem, record: int, storage_offsets: list[int], lengths: list[int], target: torch.Tensor
    ) -> ConvertedBox:
        code = self.layouts.dtype(record)
        dtype = DTYPES[code]
        if dtype is None:
            raise TypeError(f"this torch has no dtype {_native.DTYPES[code]}, which {item.storage_index} is stored in")
        return ConvertedBox(record, code, dtype, storage_offsets, lengths, self.layouts.strides(record), target)

    def _place_converted(self, boxes: list[ConvertedBox]) -> None:
        self.report.staged_items += len(boxes)
        for box in boxes:
            if (device := device_of(box.target)) is not None and served_device(box.target) is None:
                self.report.device_fallback_items += 1
                self.report.device_fallback_reason = refusals[device]
        for stats in place_converted(boxes, self.layouts, self.options, self.staging_bytes // 2, self.cuda):
            self._count(stats)

    def _place_fallback(self, placements: list[tuple[ReadItem, int, torch.Tensor]]) -> None:
        """Place boxes of records that torch.load must read, each record once."""
        loaded: tuple[int, torch.Tensor] | None = None
        for item, record, target in sorted(placements, key=lambda placement: placement[1]):
            if loaded is None or loaded[0] != record:
                loaded = None  # before the next one is read: only one is ever in memory
                loaded = (record, self.storage.load_tensor(item))
                self.report.fallback_records += 1
            try:
                source = narrow_tensor_by_index(loaded[1], item.storage_offsets, item.lengths)
            except (RuntimeError, IndexError) as error:
                raise self.storage.error(SizeMismatchError, str(error), item) from error
            if target.size() != source.size():
                reason = f"req {item.storage_index} mismatch sizes {target.size()} vs {source.size()}"
                raise self.storage.error(SizeMismatchError, reason, item)
            target.copy_(source)
            self.report.bytes_needed += source.numel() * source.element_size()

    def _load_all_bytes(self, entries: BytesEntries) -> None:
        """Plain values are read natively; all others are for the planner, one by one."""
        records = [record for record in entries.records if record not in entries.transformed]
        values, requests, bytes_read = _native.read_plain_values(self.layouts, records, self.options)
        self.report.requests += requests
        self.report.bytes_read += bytes_read
        plain = dict(zip(records, values, strict=True))
        lengths = self.items.record_rows[2::4]
        for i, (fqn, record) in enumerate(zip(entries.fqns, entries.records, strict=True)):
            value = plain.get(record, ...)
            if value is ...:
                self._load_bytes(entries.items[i])
            else:
                put_value(self.planner, fqn, value)  # type: ignore[arg-type]
                self.report.bytes_needed += lengths[record]

    def _load_bytes(self, item: ReadItem) -> None:
        value = self.storage.read(item)
        self.report.bytes_needed += value.getbuffer().nbytes
        try:
            self.planner.load_bytes(item, value)
        except LoadError as error:
            if error.path:
                raise
            # The planner knows the FQN alone.
            raise self.storage.error(type(error), error.reason, item) from error.__cause__

    def _count(self, stats: _native.Stats) -> None:
        self.report.requests += stats.requests
        self.report.bytes_read += stats.bytes_read
