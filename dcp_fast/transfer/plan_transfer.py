"""Transfer: the engine reads the boxes of a plan and places them; torch places those that the engine cannot."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count, groupby
from typing import cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.errors import LoadError, SizeMismatchError, UntrustedBytesError, typed_errors
from dcp_fast.observe.report import LoadReport
from dcp_fast.planning.hooks import has_default_bytes, has_default_hooks, has_default_resolve, has_only_commit
from dcp_fast.planning.values import is_whole, put_value
from dcp_fast.this_load import option, trusted
from dcp_fast.transfer.commit_windows import CommitWindows, Done, windows_of
from dcp_fast.transfer.destinations import Destinations
from dcp_fast.transfer.gpu import CudaLoad
from dcp_fast.transfer.items import BytesEntries, Resolved, box_of, find_items
from dcp_fast.transfer.placing import Placer
from dcp_fast.transfer.planner_state import counts_writes, hides_state, writes_to
from dcp_fast.transfer.records import Records
from dcp_fast.transfer.shared_reads import SharedReads
from dcp_fast.transfer.shared_records import SharedRecords
from dcp_fast.transfer.sharing import Sharing
from dcp_fast.transfer.staged_boxes import StagedBoxes
from dcp_fast.transfer.values_ahead import ValuesAhead
from dcp_fast.transfer.windows import Placement, Windows
from dcp_fast.values.advice import with_others
from dcp_fast.values.load import load_untrusted

_BYTE_IO = LoadItemType.BYTE_IO  # an enum's attributes are slow to get
_MOST_LOOKED_AT = 64 << 20  # bytes of entries behind one that is refused
_AGAIN = "commits changed tensors of which boxes were in place already, so that these were read again"
_OTHER_SIZE = "the planner gave tensors of other sizes than their boxes, which were read again"


class PlanTransfer:
    """One run of a load plan.

    Args:
        plan: of this rank.
        planner: whose state dict is loaded.
        records: of the checkpoint.
        options: for the native engine.
        staging_bytes: host memory that bytes may pass through, as the options have it.
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
        self.staging_bytes = staging_bytes
        self.report = report
        self.cuda = cuda
        self.plan = plan
        self._shared = SharedReads(exchange, cuda, report, self._read_alone)
        self._shared_records = SharedRecords((), lambda _: None, lambda: None)
        self._ahead: ValuesAhead | None = None

    def run(self) -> None:
        """Load everything. Raises LoadError, and whatever the planner raises."""
        try:
            self._run()
        finally:
            self._shared_records.close()
            self._shared.forget()

    def _run(self) -> None:
        report = self.report
        with report.stage("layout"), paused_collection():
            self.items = find_items(self.plan, self.records)
        rows = self.items.record_rows
        with typed_errors(rows.fqns, self.records.root):
            with report.stage("layout"):
                self.quantized = self.records.quantized(rows.fqns)
                for record in self.quantized:
                    rows.rows[4 * record + 3] = 1  # not for the engine alone
                if not self._shared.is_wanted:
                    self.options = self._options_on_node()
                paths = list(map(self.records.path, rows.files))
                self.layouts = _native.open_files(paths, rows.rows, self.options, rows.payloads)
                of_headers = self._shared.get_records(self.layouts, rows, paths, self.quantized, self.options)
                self.layouts.read_headers(of_headers)
                self.placer = Placer(
                    self.layouts,
                    rows,
                    self.quantized,
                    self.records,
                    self.options,
                    self.staging_bytes,
                    self.cuda,
                    self._shared,
                    report,
                )
            report.records = len(self.layouts)
            report.files_shared_on_node = self.layouts.shared_files
            report.requests += self.layouts.requests
            report.bytes_read += self.layouts.bytes_read
            try:
                if not (has_default_hooks(self.planner) and self._place_at_once()):
                    self._place_in_order()
                self._shared.decline("")
                self.cuda.finish()
            except BaseException:
                self.cuda.abort()
                raise

    def _options_on_node(self) -> _native.Options:
        """Find out whether other ranks of this node may need the same bytes, which then go through the page cache."""
        if _native.ranks_of_node() == 1:
            return self.options
        rows = self.items.record_rows
        return self.options.on_node(float(sum(rows.rows[2::4])), self.records.stored_bytes(rows.fqns))

    def _read_alone(self) -> None:
        """All ranks read alone what they were to share: those of a node share its page cache at least."""
        self.layouts.read_as(self._options_on_node())
        self.report.files_shared_on_node = self.layouts.shared_files

    # Placement

    def _place_at_once(self) -> bool:
        """Find all destinations, then place all tensors in any order that gives torch's result.

        Returns:
            False, with nothing placed, if such an order cannot be told: a destination has no address, and may share its
            memory with another one.
        """
        with self.report.stage("transfer"), paused_collection():
            resolved = self.items.resolve(self.planner.state_dict)  # type: ignore[attr-defined]
            destinations = resolved.destinations
            if not destinations.all_have_addresses:
                return False
            self.cuda.keep(destinations.tensors)
            self._place_all(resolved, resolved.bytes_entries.records)
        with self.report.stage("commit"):
            self._load_all_bytes(resolved.bytes_entries)
        return True

    def _place_all(self, resolved: Resolved, entries: Sequence[int]) -> None:
        """Place all tensors, with other ranks if these share reads. Bytes entries are loaded later, in this order."""
        self._shared_records = self._shared.bytes_entries(entries, self.layouts, self.items.record_rows, self.options)
        items, records, rows = resolved.items, resolved.records, resolved.rows
        self.placer.place(items, records, rows, resolved.destinations, resolved.target)
        if len(self._shared_records) == 0:
            # Whoever needs no more keeps no other rank waiting for what hooks and bytes entries take.
            self._shared.decline("")

    def _place_in_order(self) -> None:
        """For planners with hooks: resolve and commit all items in torch's order."""
        shares = self._shared.is_wanted
        with self.report.stage("commit"):
            known = has_only_commit(self.planner) and not hides_state(self.planner)
            done = self._commit_windows() if known else Done(0)
        if done.is_all:
            return
        if shares and not self._shared.is_wanted:
            self.report.note_reads_alone(_AGAIN)
        with self.report.stage("layout"), paused_collection():
            items = self.items.in_order()[done.items :]
        staged: list[StagedBoxes] = []
        if self._shared.is_wanted:
            with self.report.stage("transfer"), paused_collection():
                arriving = self.placer.stage(items)
            if arriving is None:
                self._shared.decline("a box of the plan does not fit what is stored")
            else:
                staged, self._shared_records = arriving
        self._read_values_ahead(record for item, record in items if item.type is _BYTE_IO)
        # Tensors of the state dict are there anyway; a planner with a way of its own may have allocated others.
        in_state_dict = has_default_resolve(self.planner)
        resolve = self._resolve_in_state_dict if in_state_dict else self.planner.resolve_tensor
        most_bytes = sys.maxsize if in_state_dict else self.staging_bytes
        place = partial(self._place_window, staged, self.placer.alone())
        windows = Windows(self.planner, partial(self._resolve, resolve), place, most_bytes, done.one_by_one)
        try:
            with self.report.stage("commit"):
                for item, record in items:
                    if item.type is _BYTE_IO:
                        windows.add_bytes(partial(self._load_bytes, item, record))
                    else:
                        windows.add(item, record)
                windows.finish()
        finally:
            self.report.note_slow_planner(windows.why_slow)

    def _commit_windows(self) -> Done:
        """Place windows of a program of all items; or all of them at once, with other ranks that share reads.

        What is left is for windows. Nothing is placed, and the exchange is yet to come, if none of it was in place.
        """
        report, planner = self.report, cast(DefaultLoadPlanner, self.planner)
        try:
            with report.stage("transfer"), paused_collection():
                resolved = self.items.resolve(planner.state_dict)
                destinations, numbers = resolved.destinations, resolved.numbers
                program = _native.Program(self.layouts, resolved.rows, destinations.column)
                if program.waves > 1 or not destinations.all_have_addresses:
                    return Done(0)
                fqns = resolved.fqns()
                of_boxes = list(map(planner.state_dict.get, fqns))
                values = dict(zip(numbers, of_boxes, strict=True))  # by destination
                others = (value for n, value in values.items() if value is not destinations.tensors[n])
                if any(tensor.is_inference() for tensor in destinations.tensors) or not all(map(counts_writes, others)):
                    return Done(0)  # nobody would notice that a commit has written to what is in place already
                windows = windows_of(self.items.order(), fqns)
                program.cut([[item for item in window if item >= 0] for window in windows])
        except Exception:
            return Done(0)  # it is raised again where its item has its turn
        self.cuda.keep(destinations.tensors)
        in_place: dict[int, int] = {}  # by destination how often it was written to when it got all of its boxes

        def writes(destination: int) -> int:
            return writes_to(destinations.tensors[destination], values[destination])

        if self._shared.is_wanted:
            with report.stage("transfer"), paused_collection():
                records = resolved.bytes_entries.records
                self._place_all(resolved, [records[~item] for item in self.items.order() if item < 0])
            in_place = {n: writes(n) for n in values}

        def place(number: int, boxes: Sequence[int]) -> bool:
            written = [destinations.tensors[numbers[box]] for box in boxes]
            here = {numbers[box] for box in boxes} if in_place else set()
            untouched = [n for n in here if writes(n) == in_place[n]]
            if in_place and len(untouched) == len(here):
                return True
            items, records = resolved.items, resolved.records
            with report.stage("transfer"):
                is_placed = self.placer.run(program, [number], items, records, destinations, written, resolved.target)
            for n in untouched:  # so far as other boxes of them go
                in_place[n] = writes(n)
            if in_place:
                report.note_reads_alone(_AGAIN)
            return is_placed

        entries = resolved.bytes_entries
        self._read_values_ahead(entries.records[~item] for item in self.items.order() if item < 0)

        def load_bytes(entry: int) -> None:
            self._load_bytes(entries.items[entry], entries.records[entry])

        return CommitWindows(planner, resolved, fqns, of_boxes, place, load_bytes).run(windows)

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

    def _place_window(self, staged: Sequence[StagedBoxes], placer: Placer, placements: Sequence[Placement]) -> None:
        def boxes_of(placement: Placement) -> StagedBoxes | None:
            return next((boxes for boxes in staged if boxes.can_place(placement.item, placement.tensor)), None)

        for boxes, group in groupby(placements, boxes_of):
            if boxes is None:
                of_group = list(group)
                for placement in of_group:
                    if any(placement.item in boxes for boxes in staged):
                        fits = list(placement.tensor.size()) == list(placement.item.lengths)
                        self.report.note_reads_alone(_AGAIN if fits else _OTHER_SIZE)
                self._place_alone(placer, of_group)
                continue
            for placement in group:
                with self.report.stage("transfer"):
                    self.report.bytes_needed += boxes.place(placement.item, placement.tensor)
                self.report.staged_items += 1

    def _place_alone(self, placer: Placer, placements: Sequence[Placement]) -> None:
        with self.report.stage("transfer"):
            destinations = Destinations([placement.tensor for placement in placements])
            rows: list[int] = []
            for number, placement in enumerate(placements):
                storage_offsets, _, lengths = box_of(placement.item)
                dims = len(lengths)
                rows += (placement.record, number, dims, *storage_offsets, *(0,) * dims, *lengths)
            if not destinations.all_have_addresses and len(placements) > 1:
                self._place_in_turn(placer, placements)
                return
            items, records = [p.item for p in placements], [p.record for p in placements]
            placer.place(items, records, array("q", rows), destinations, lambda i, _: placements[i].tensor)

    def _place_in_turn(self, placer: Placer, placements: Sequence[Placement]) -> None:
        """Place one after another: any of them may share its memory with any other."""
        for is_alone, group in groupby(placements, lambda placement: placer.is_placed_alone(placement.record)):
            if is_alone:
                for placement in group:
                    self._place_alone(placer, [placement])
            else:
                placer.place_fallback([(p.item, p.record, p.tensor) for p in group])

    def _load_all_bytes(self, entries: BytesEntries) -> None:
        """Plain values are read natively; all others are for the planner, one by one."""
        lengths = self.items.record_rows.rows[2::4]
        numbers = count()
        for run in self._shared_records.runs(entries.records):
            records = [record for record in run if record not in entries.transformed]
            values, requests, bytes_read = _native.read_plain_values(self.layouts, records, self.options)
            self.report.requests += requests
            self.report.bytes_read += bytes_read
            plain = dict(zip(records, values, strict=True))
            for record, i in zip(run, numbers, strict=False):
                value = plain.get(record, ...)
                if value is ...:
                    self._load_bytes(entries.items[i], record)
                else:
                    put_value(self.planner, entries.fqns[i], value)  # type: ignore[arg-type]
                    self.report.bytes_needed += lengths[record]

    def _with_other_refusals(self, error: UntrustedBytesError, item: ReadItem, record: int) -> UntrustedBytesError:
        """The error of an entry that is refused, which tells of all others: nobody has to try again for each."""
        others = []
        room = _MOST_LOOKED_AT
        entries = [entry for entry in self.items.in_order() if entry[0].type is _BYTE_IO]
        turn = next(turn for turn, (_, other) in enumerate(entries) if other == record)
        # Those before it by this order may come behind it by that of the plan.
        for other, other_record in [*entries[turn + 1 :], *entries[:turn]]:
            room -= self.items.record_rows.length_of(other_record)
            if room < 0:
                break
            try:
                load_untrusted(self.records.read(other, self.layouts, other_record), other.dest_index.fqn)
            except UntrustedBytesError as refused:
                others.append(refused)
            except Exception:  # it is told when it has its turn
                continue
        told = cast(UntrustedBytesError, self.records.error(UntrustedBytesError, with_others(error, others), item))
        told.safe_globals = error.safe_globals
        return told

    def _read_values_ahead(self, records: Iterable[int]) -> None:
        """Read plain values of bytes entries before their turns, unless they come from other ranks, or go to a hook."""
        if has_default_bytes(self.planner) and len(self._shared_records) == 0:
            rows = self.items.record_rows
            untransformed = (record for record in records if record not in rows.transformed)
            self._ahead = ValuesAhead(self.layouts, self.options, untransformed, rows.length_of, self.report)

    def _load_bytes(self, item: ReadItem, record: int) -> None:
        if self._ahead is not None and (plain := self._ahead.take(record)) is not ...:
            put_value(self.planner, item.dest_index.fqn, plain)  # type: ignore[arg-type]
            self.report.bytes_needed += self.items.record_rows.length_of(record)
            return
        with self._shared_records.reach(record):
            value = self.records.read(item, self.layouts, record)
        self.report.bytes_needed += value.getbuffer().nbytes
        try:
            # Of a method that was taken from torch's class, too.
            with trusted() if option(self.planner, "trust_bytes") else nullcontext():
                self.planner.load_bytes(item, value)
        except LoadError as error:
            if error.path:
                raise
            # The planner knows the FQN, but neither file nor byte range.
            if isinstance(error, UntrustedBytesError):
                raise self._with_other_refusals(error, item, record) from error.__cause__
            raise self.records.error(type(error), error.reason, item) from error.__cause__
