"""Transfer: the engine reads the boxes of a plan and places them; torch places those that the engine cannot."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from itertools import groupby

import torch
from torch.autograd.graph import increment_version
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.collector import paused_collection
from dcp_fast.errors import CudaError, LoadError, SizeMismatchError, typed_errors
from dcp_fast.observe.report import LoadReport, count_stats
from dcp_fast.planning.hooks import has_default_hooks, has_default_resolve
from dcp_fast.planning.planner import put_value
from dcp_fast.planning.values import is_whole
from dcp_fast.transfer.batches import ConvertedBox
from dcp_fast.transfer.conversion import place_converted
from dcp_fast.transfer.dequantization import Dequantizer
from dcp_fast.transfer.destinations import DTYPES, Destinations
from dcp_fast.transfer.devices import device_of, refusals, served_device
from dcp_fast.transfer.fallback import place_fallback
from dcp_fast.transfer.gpu import CudaLoad, CudaRefusedError
from dcp_fast.transfer.items import BytesEntries, box_of, find_items
from dcp_fast.transfer.quantized_parts import QuantizedBox
from dcp_fast.transfer.records import Records
from dcp_fast.transfer.shared_reads import SharedReads
from dcp_fast.transfer.sharing import Sharing
from dcp_fast.transfer.windows import Placement, Windows

_MOST_DEVICES = 64  # of a process
# Figures of a report that start again where an attempt ends because a driver refuses what it needs.
_COUNTED_ANEW = (
    *("bytes_needed", "staged_items", "dequantized_items", "fallback_records", "fallback_reasons"),
    "device_fallback_items",
)

_BYTE_IO = LoadItemType.BYTE_IO  # an enum's attributes are slow to get


class PlanTransfer:
    """One run of a load plan.

    Args:
        plan: of this rank.
        planner: whose state dict is loaded.
        records: of the checkpoint.
        options: for the native engine.
        staging_bytes: host memory that bytes may pass through, as the options have it. The engine gets all of it for
            boxes that it places in host memory, and half where torch places or reads, or a GPU is loaded to.
        cuda: brings bytes to destinations on GPUs.
        report: is filled in.
        exchange: with the other ranks, if they share reads.
    """

    def __init__(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        records: Records,
        options: _native.Options,
        staging_bytes: int,
        cuda: CudaLoad,
        report: LoadReport,
        exchange: Sharing | None = None,
    ) -> None:
        self.planner = planner
        self.records = records
        self.options = options
        self.half = options.share(2)
        self.staging_bytes = staging_bytes
        self.report = report
        self.cuda = cuda
        self.plan = plan
        self._dequantizer: Dequantizer | None = None
        self._shared = SharedReads(exchange, cuda, report)

    def run(self) -> None:
        """Load everything. Raises LoadError, and whatever the planner raises."""
        report = self.report
        with report.stage("layout"), paused_collection():
            self.items = find_items(self.plan, self.records)
        rows = self.items.record_rows
        with typed_errors(rows.fqns, self.records.root):
            with report.stage("layout"):
                self.quantized = self.records.quantized(rows.fqns)
                for record in self.quantized:
                    rows.rows[4 * record + 3] = 1  # not for the engine alone
                self._share_on_node()
                paths = list(map(self.records.path, rows.files))
                self.layouts = _native.open_files(paths, rows.rows, self.options, rows.payloads)
                self._shared.get_records(self.layouts, rows, paths, self.quantized, self.options)
                self.layouts.read_headers(self.options)
            report.records = len(self.layouts)
            report.files_shared_on_node = self.layouts.shared_files
            report.requests += self.layouts.requests
            report.bytes_read += self.layouts.bytes_read
            try:
                if not (has_default_hooks(self.planner) and self._place_at_once()):
                    self._place_in_order()
                self.cuda.finish()
            except BaseException:
                self.cuda.abort()
                raise

    def _share_on_node(self) -> None:
        """Find out whether other ranks of this node may need the same bytes, which then go through the page cache."""
        if _native.ranks_of_node() == 1 or self._shared.is_wanted:
            return
        rows = self.items.record_rows
        self.options = self.options.on_node(float(sum(rows.rows[2::4])), self.records.stored_bytes(rows.fqns))
        self.half = self.options.share(2)

    # Placement

    def _place_at_once(self) -> bool:
        """Find all destinations, then place all tensors in any order that gives torch's result.

        Returns:
            False, with nothing placed, if such an order cannot be told: a destination has no address, and may share its
            memory with another one.
        """
        with self.report.stage("transfer"), paused_collection():
            resolved = self.items.resolve(self.planner.state_dict)  # type: ignore[attr-defined]
            destinations, numbers, items = resolved.destinations, resolved.numbers, resolved.items
            if not destinations.all_have_addresses:
                return False

            def target(i: int, item: ReadItem) -> torch.Tensor:
                tensor = destinations.tensors[numbers[i]].detach()
                return narrow_tensor_by_index(tensor, item.dest_offsets, item.lengths)

            self.cuda.keep(destinations.tensors)
            self._place(items, resolved.records, resolved.rows, destinations, target)
        with self.report.stage("commit"):
            self._load_all_bytes(resolved.bytes_entries)
        return True

    def _place_in_order(self) -> None:
        """For planners with hooks: resolve and commit all items in torch's order."""
        self._shared.decline("items are placed in the order of the plan, not in that of the bytes")
        with self.report.stage("layout"), paused_collection():
            items = self.items.in_order()
        # Tensors of the state dict are there anyway; a planner with a way of its own may have allocated others.
        in_state_dict = has_default_resolve(self.planner)
        resolve = self._resolve_in_state_dict if in_state_dict else self.planner.resolve_tensor
        most_bytes = sys.maxsize if in_state_dict else self.staging_bytes
        windows = Windows(self.planner, partial(self._resolve, resolve), self._place_window, most_bytes)
        with self.report.stage("commit"):
            for item, record in items:
                if item.type is _BYTE_IO:
                    windows.add_bytes(partial(self._load_bytes, item, record))
                else:
                    windows.add(item, record)
            windows.finish()

    def _resolve_in_state_dict(self, item: ReadItem) -> torch.Tensor:
        """As torch's planner does, which takes longer for a whole tensor."""
        index = item.dest_index
        value = self.planner.state_dict.get(index.fqn)  # type: ignore[attr-defined]
        if not is_whole(value) or any(index.offset or ()):
            return self.planner.resolve_tensor(item)
        sizes, offsets, lengths = value.size(), item.dest_offsets, item.lengths
        if not len(sizes) == len(offsets) == len(lengths) == len(index.offset or sizes):
            return self.planner.resolve_tensor(item)
        for dim, length in enumerate(lengths):
            if length < sizes[dim]:
                value = value.narrow(dim, offsets[dim], length)
        return value

    def _resolve(self, resolve: Callable[[ReadItem], torch.Tensor], item: ReadItem, record: int) -> Placement:
        tensor = resolve(item).detach()
        # Here the destination is the box itself, so nothing of it may be left out.
        size = tensor.size()
        if size != item.lengths and any(length < size for length, size in zip(item.lengths, size, strict=False)):
            reason = f"req {item.storage_index} mismatch sizes {tensor.size()} vs {item.lengths}"
            raise self.records.error(SizeMismatchError, reason, item)
        return Placement(item, record, tensor)

    def _place_window(self, placements: Sequence[Placement]) -> None:
        with self.report.stage("transfer"):
            destinations = Destinations()
            rows: list[int] = []
            for placement in placements:
                number = destinations.add(placement.tensor)
                storage_offsets, _, lengths = box_of(placement.item)
                dims = len(lengths)
                rows += (placement.record, number, dims, *storage_offsets, *(0,) * dims, *lengths)
            if not destinations.all_have_addresses and len(placements) > 1:
                self._place_in_turn(placements)
                return
            items, records = [p.item for p in placements], [p.record for p in placements]
            self._place(items, records, array("q", rows), destinations, lambda i, _: placements[i].tensor)

    def _place_in_turn(self, placements: Sequence[Placement]) -> None:
        """Place one after another: any of them may share its memory with any other."""
        for is_alone, group in groupby(placements, lambda placement: self._is_placed_alone(placement.record)):
            if is_alone:
                for placement in group:
                    self._place_window([placement])
            else:
                self._place_fallback([(p.item, p.record, p.tensor) for p in group])

    def _is_placed_alone(self, record: int) -> bool:
        return record in self.quantized or self.layouts.is_tensor(record)

    def _place(
        self,
        items: Sequence[ReadItem],
        records: Sequence[int],
        rows: Buffer,
        destinations: Destinations,
        target: Callable[[int, ReadItem], torch.Tensor],
    ) -> None:
        report = self.report
        attempts_left = _MOST_DEVICES
        refused = True
        while refused:
            before = {name: copy(getattr(report, name)) for name in _COUNTED_ANEW}
            program = _native.Program(self.layouts, rows, destinations.column())
            report.bytes_needed += program.bytes_needed
            try:
                self._run(program, items, records, destinations, target)
                refused = False
            except CudaRefusedError as error:
                # Refusals are remembered, so that there is one for each device, unless another thread calls
                # release_staging() all the time.
                attempts_left -= 1
                if attempts_left == 0:
                    raise CudaError(str(error)) from None
            if refused:
                # Again from the beginning, without that device. Boxes that are in place already get the same values.
                self.cuda.give_up()
                vars(report).update(before)
                destinations = destinations.anew()

    def _run(
        self,
        program: _native.Program,
        items: Sequence[ReadItem],
        records: Sequence[int],
        destinations: Destinations,
        target: Callable[[int, ReadItem], torch.Tensor],
    ) -> None:
        try:
            options = self.half if destinations.devices else self.options
            for wave in range(program.waves):
                if not self._shared.place_boxes(self.layouts, program, options, destinations.devices):
                    if destinations.devices:
                        stats = self.cuda.run(program, wave, options, destinations.devices)
                    else:
                        stats = program.run(wave, options)
                    count_stats(self.report, stats)
                converted = [
                    self._converted_box(item, records[i], *program.box(i), target(i, item))
                    for i, item in _pick(items, program.converted(wave))
                ]
                if converted:
                    self._place_converted(converted)
                fallback = [(item, records[i], target(i, item)) for i, item in _pick(items, program.fallback(wave))]
                self._place_fallback(sorted(fallback, key=lambda box: self.items.record_rows.place_of(box[1])))
        finally:
            # As copy_ does, so that autograd notices that tensors that were saved for backward have changed. Also after
            # an error, when nobody knows which of them were written.
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
        self._count_refused([box.target for box in boxes])
        for stats in place_converted(boxes, self.layouts, self.half, self.staging_bytes // 2, self.cuda):
            count_stats(self.report, stats)

    def _place_fallback(self, boxes: Sequence[tuple[ReadItem, int, torch.Tensor]]) -> None:
        quantized = [
            QuantizedBox(self.quantized[record], box_of(item)[0], target)
            for item, record, target in boxes
            if record in self.quantized
        ]
        if quantized:
            self._place_quantized(quantized)
            boxes = [box for box in boxes if box[1] not in self.quantized]
        place_fallback(boxes, self.records, self.layouts, self.half, self.staging_bytes, self.report)

    def _place_quantized(self, boxes: list[QuantizedBox]) -> None:
        if self._dequantizer is None:
            self._dequantizer = Dequantizer(self.quantized.values(), self.half)
        self.report.dequantized_items += len(boxes)
        self._count_refused([box.target for box in boxes])
        for stats in self._dequantizer.place(boxes, self.staging_bytes // 2, self.cuda):
            self.report.bytes_needed += stats.bytes_placed
            count_stats(self.report, stats)

    def _load_all_bytes(self, entries: BytesEntries) -> None:
        """Plain values are read natively; all others are for the planner, one by one."""
        records = [record for record in entries.records if record not in entries.transformed]
        values, requests, bytes_read = _native.read_plain_values(self.layouts, records, self.options)
        self.report.requests += requests
        self.report.bytes_read += bytes_read
        plain = dict(zip(records, values, strict=True))
        lengths = self.items.record_rows.rows[2::4]
        for i, (fqn, record) in enumerate(zip(entries.fqns, entries.records, strict=True)):
            value = plain.get(record, ...)
            if value is ...:
                self._load_bytes(entries.items[i], record)
            else:
                put_value(self.planner, fqn, value)  # type: ignore[arg-type]
                self.report.bytes_needed += lengths[record]

    def _load_bytes(self, item: ReadItem, record: int) -> None:
        value = self.records.read(item, self.layouts, record)
        self.report.bytes_needed += value.getbuffer().nbytes
        try:
            self.planner.load_bytes(item, value)
        except LoadError as error:
            if error.path:
                raise
            # The planner knows the FQN, but neither file nor byte range.
            raise self.records.error(type(error), error.reason, item) from error.__cause__

    def _count_refused(self, targets: Sequence[torch.Tensor]) -> None:
        """Count those that torch brings to their device, as its driver refuses what the engine needs."""
        for target in targets:
            if (device := device_of(target)) is not None and served_device(target) is None:
                self.report.device_fallback_items += 1
                self.report.device_fallback_reason = refusals[device]


def _pick(items: Sequence[ReadItem], indices: Sequence[int]) -> Iterator[tuple[int, ReadItem]]:
    """Items with their indices. Each is asked for once, as it may be made when it is."""
    return ((i, items[i]) for i in indices)
