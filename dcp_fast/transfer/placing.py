"""Places the boxes of items: by the engine, or by torch where the engine cannot."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast.errors import CudaError, typed_errors
from dcp_fast.observe.report import LoadReport, count_stats
from dcp_fast.transfer.batches import ALIGNMENT, Batch, Box, ConvertedBox, Part, StoredBox, batches_of, bytes_of
from dcp_fast.transfer.conversion import by_device, empty, place_converted
from dcp_fast.transfer.dequantization import Dequantizer, QuantizedBatch, cut_by_device
from dcp_fast.transfer.destinations import DTYPES, ELSEWHERE, UNKNOWN, Destinations
from dcp_fast.transfer.devices import device_of, refusals, served_device
from dcp_fast.transfer.fallback import place_fallback
from dcp_fast.transfer.gpu import CudaLoad, CudaRefusedError
from dcp_fast.transfer.items import box_of
from dcp_fast.transfer.quantized_parts import CutBox, QuantizedBox, batches_of_parts
from dcp_fast.transfer.quantized_parts import Part as QuantizedPart
from dcp_fast.transfer.quantized_tensors import QuantizedTensor
from dcp_fast.transfer.record_rows import RecordRows
from dcp_fast.transfer.records import Records
from dcp_fast.transfer.shared_batches import SharedBatches
from dcp_fast.transfer.shared_quantized import SharedBoxes
from dcp_fast.transfer.shared_reads import SharedReads
from dcp_fast.transfer.shared_records import SharedRecords
from dcp_fast.transfer.sharing import Phase
from dcp_fast.transfer.staged_boxes import Piece, StagedBoxes

_ConvertedBatches = SharedBatches[Part[ConvertedBox], Batch[ConvertedBox]]
_QuantizedBatches = SharedBatches[QuantizedPart, QuantizedBatch]

_BYTE_IO = LoadItemType.BYTE_IO  # an enum's attributes are slow to get
_MOST_DEVICES = 64  # of a process
# All ranks take part in an exchange for each, whoever needs it. Tied weights make a few, and aliases by the thousand
# make thousands: more of them take less time alone.
_MOST_SHARED_WAVES = 16
_LATER_WAVES = "boxes that are written over others were read alone: they are too many, or some tensors are quantized"
# Figures of a report that start again where an attempt ends because a driver refuses what it needs.
_COUNTED_ANEW = (
    *("bytes_needed", "staged_items", "dequantized_items", "fallback_records", "fallback_reasons"),
    "device_fallback_items",
)


class _SharedWave(NamedTuple):
    """A wave that ranks share: boxes that torch converts, batches that they come in, and records that torch reads."""

    converted: list[ConvertedBox]
    batches: list[_ConvertedBatches]
    records: SharedRecords


class Placer:
    """Places boxes of the records of one load.

    Args:
        layouts: of the records.
        rows: of the records.
        quantized: those that are dequantized, by their number.
        records: of the checkpoint.
        options: for the native engine.
        staging_bytes: host memory that bytes may pass through. The engine gets all of it for boxes that it places in
            host memory, and half where torch places or reads, or a GPU is loaded to.
        cuda: brings bytes to destinations on GPUs.
        shared: what is read together with other ranks.
        report: is filled in.
    """

    def __init__(
        self,
        layouts: _native.Layouts,
        rows: RecordRows,
        quantized: Mapping[int, QuantizedTensor],
        records: Records,
        options: _native.Options,
        staging_bytes: int,
        cuda: CudaLoad,
        shared: SharedReads,
        report: LoadReport,
    ) -> None:
        self._layouts = layouts
        self._rows = rows
        self._quantized = quantized
        self._records = records
        self._options = options
        self._half = options.share(2)
        self._staging_bytes = staging_bytes
        self._cuda = cuda
        self._shared = shared
        self._report = report
        self._refusal = ""
        self._shared_records = SharedRecords((), lambda _: None, lambda: None)
        self._has_staged = False

    def alone(self) -> Placer:
        """One that places boxes without other ranks, but for records that are on their way from them."""
        placer = copy(self)
        placer._shared = SharedReads(None, self._cuda, self._report, lambda: None)
        return placer

    def stage(self, items: Sequence[tuple[ReadItem, int]]) -> tuple[list[StagedBoxes], SharedRecords] | None:
        """Have boxes arrive from other ranks, to wait until it is known where they go.

        Args:
            items: and their records, in the order in which they are wanted.

        Returns:
            Those as they are stored, and those of quantized tensors; and records that come whole. None if a box does
            not fit what is stored: an error for when its item has its turn. The exchange is yet to come then.
        """
        tensors = [(item, record) for item, record in items if item.type is not _BYTE_IO]
        rows, destinations = array("q"), array("q")
        quantized: dict[int, QuantizedBox] = {}
        try:
            for number, (item, record) in enumerate(tensors):
                offsets, _, lengths = box_of(item)
                dims = len(lengths)
                rows.extend((record, number, dims, *offsets, *(0,) * dims, *lengths))
                destinations.extend((0, ELSEWHERE, UNKNOWN, 1, dims, *lengths, *(0,) * dims))
                if (tensor := self._quantized.get(record)) is not None:
                    # Of the target that torch will bring it to nothing is known.
                    target = torch.empty(tuple(lengths), dtype=tensor.target_dtype, device="meta")
                    quantized[id(item)] = QuantizedBox(tensor, offsets, lengths, target)
            program = _native.Program(self._layouts, rows, destinations)
            boxes = {id(tensors[i][0]): self._stored_box(*tensors[i], *program.box(i)) for i in program.converted(0)}
            cut = dict(zip(quantized, cut_by_device([*quantized.values()]).get(None, []), strict=True))
        except Exception:
            return None
        batches = self._batches_of([*boxes.values()], None)
        staged = [StagedBoxes(boxes, batches.parts, _arriving(batches))]
        of_torch = {tensors[i][1] for i in program.fallback(0)} - self._quantized.keys()
        whole = [record for item, record in items if item.type is _BYTE_IO or record in of_torch]
        self._shared_records = self._shared.records(whole, self._layouts, self._rows, self._half)
        self._has_staged = True
        more = len(batches) + len(self._shared_records)
        if cut:
            self._report.dequantized_items += len(cut)
            of_quantized = self._quantized_batches([*cut.values()], None, Phase.BATCHES)
            staged.append(StagedBoxes(cut, of_quantized.parts, self._dequantized(of_quantized)))
            more += len(of_quantized)
        self._shared.place_boxes(self._layouts, program, 0, self._options, (), more)
        return staged, self._shared_records

    def _dequantized(self, batches: _QuantizedBatches) -> Iterator[tuple[Sequence[Piece], int]]:
        with typed_errors(self._dequantizer.fqns):
            for batch in batches:
                batch.dequantize(self._half, self._cuda)
                yield batch.staged, batch.bytes

    def is_placed_alone(self, record: int) -> bool:
        return record in self._quantized or self._layouts.is_tensor(record)

    def place(
        self,
        items: Sequence[ReadItem],
        records: Sequence[int],
        rows: Buffer,
        destinations: Destinations,
        target: Callable[[int, ReadItem], torch.Tensor],
    ) -> None:
        # Refusals are remembered, so that there is one for each device, unless another thread calls release_staging()
        # all the time.
        for _ in range(_MOST_DEVICES):
            program = _native.Program(self._layouts, rows, destinations.column)
            waves = range(program.waves)
            if self.run(program, waves, items, records, destinations, destinations.tensors, target):
                return
            # Again from the beginning, without that device. Boxes that are in place already get the same values.
            destinations = destinations.anew()
        raise CudaError(self._refusal)

    def run(
        self,
        program: _native.Program,
        waves: Sequence[int],
        items: Sequence[ReadItem],
        records: Sequence[int],
        destinations: Destinations,
        written: Sequence[torch.Tensor],
        target: Callable[[int, ReadItem], torch.Tensor],
    ) -> bool:
        """Run waves of a program.

        Args:
            program: of the items.
            waves: their numbers.
            items: all items.
            records: of each.
            destinations: that the program writes to.
            written: those that the waves write to.
            target: makes the box of an item.

        Returns:
            False if the driver of a device refuses what the engine needs. Nothing of this is in the report then, but
            the refusal, and the device is left to torch from now on.
        """
        before = {name: copy(getattr(self._report, name)) for name in _COUNTED_ANEW}
        try:
            shared = self._shared_waves(program, waves, items, records, target) if self._shared.is_wanted else {}
            if 0 < len(shared) < len(waves):
                self._report.note_reads_alone(_LATER_WAVES)
            more = sum(1 + sum(map(len, of_wave.batches)) + len(of_wave.records) for of_wave in shared.values()) - 1
            for wave in waves:
                self._report.bytes_needed += program.bytes_needed_of(wave)
                of_wave = shared.pop(wave, None)
                if of_wave is not None:
                    converted, batches = of_wave.converted, of_wave.batches
                    self._shared_records = of_wave.records
                    self._run_shared(program, wave, destinations, more)
                    more = 0
                else:
                    converted, batches = self._converted_boxes(program, wave, items, records, target), []
                    self._run_alone(program, wave, destinations)
                if converted:
                    self._place_converted(converted, batches)
                fallback = self._fallback(program, wave, records)
                self.place_fallback([(item, records[i], target(i, item)) for i, item in _pick(items, fallback)])
                if of_wave is not None:
                    of_wave.records.close()
            return True
        except CudaRefusedError as error:
            self._refusal = str(error)
        finally:
            # As copy_ does, so that autograd notices that tensors that were saved for backward have changed. Also after
            # an error, when nobody knows which of them were written.
            increment_version(written)
        self._cuda.give_up()
        vars(self._report).update(before)
        return False

    def _shared_waves(
        self,
        program: _native.Program,
        waves: Sequence[int],
        items: Sequence[ReadItem],
        records: Sequence[int],
        target: Callable[[int, ReadItem], torch.Tensor],
    ) -> dict[int, _SharedWave]:
        """The waves that ranks share."""
        shared = {}
        # Quantized tensors come after all waves, and some may be of the first one: then the others are read alone.
        for wave in waves[: 1 if self._quantized else _MOST_SHARED_WAVES]:
            converted = self._converted_boxes(program, wave, items, records, target)
            batches = [self._batches_of(boxes, device) for device, boxes in by_device(converted).items()]
            of_torch = [records[i] for i in self._fallback(program, wave, records)]
            whole = [record for record in of_torch if record not in self._quantized]
            shared[wave] = _SharedWave(
                converted, batches, self._shared.records(whole, self._layouts, self._rows, self._half)
            )
        return shared

    def _fallback(self, program: _native.Program, wave: int, records: Sequence[int]) -> list[int]:
        """The items of a wave whose records torch reads: in the order of these, or as records were staged."""
        fallback = program.fallback(wave)
        if self._has_staged:
            return fallback
        return sorted(fallback, key=lambda item: self._rows.place_of(records[item]))

    def _run_shared(self, program: _native.Program, wave: int, destinations: Destinations, more: int) -> None:
        """Place the boxes of a wave that the engine places together with other ranks; ``more`` as of SharedReads."""
        options, devices = self._options_for(destinations), destinations.devices
        if not self._shared.place_boxes(self._layouts, program, wave, options, devices, more):
            self._run_alone(program, wave, destinations)

    def _run_alone(self, program: _native.Program, wave: int, destinations: Destinations) -> None:
        options, devices = self._options_for(destinations), destinations.devices
        stats = self._cuda.run(program, wave, options, devices) if devices else program.run(wave, options)
        count_stats(self._report, stats)

    def _options_for(self, destinations: Destinations) -> _native.Options:
        return self._half if destinations.devices else self._options

    def _converted_boxes(
        self,
        program: _native.Program,
        wave: int,
        items: Sequence[ReadItem],
        records: Sequence[int],
        target: Callable[[int, ReadItem], torch.Tensor],
    ) -> list[ConvertedBox]:
        return [
            ConvertedBox(**vars(self._stored_box(item, records[i], *program.box(i))), target=target(i, item))
            for i, item in _pick(items, program.converted(wave))
        ]

    def _stored_box(self, item: ReadItem, record: int, storage_offsets: list[int], lengths: list[int]) -> StoredBox:
        code = self._layouts.dtype(record)
        dtype = DTYPES[code]
        if dtype is None:
            raise TypeError(f"this torch has no dtype {_native.DTYPES[code]}, which {item.storage_index} is stored in")
        return StoredBox(record, code, dtype, storage_offsets, lengths, self._layouts.strides(record))

    def _batches_of(self, boxes: Sequence[Box], device: int | None) -> SharedBatches[Part[Box], Batch[Box]]:
        wanted = sum(map(bytes_of, boxes)) + ALIGNMENT
        return self._shared.batches(partial(batches_of, boxes), wanted, Batch, device, self._layouts, self._half)

    def _place_converted(self, boxes: list[ConvertedBox], shared: Sequence[_ConvertedBatches]) -> None:
        self._report.staged_items += len(boxes)
        self._count_refused([box.target for box in boxes])
        for batches in shared:
            for batch in batches:
                empty(batch, batches.device, self._half)
        if shared:
            return
        for stats in place_converted(boxes, self._layouts, self._half, self._staging_bytes // 2, self._cuda):
            count_stats(self._report, stats)

    def place_fallback(self, boxes: Sequence[tuple[ReadItem, int, torch.Tensor]]) -> None:
        of_torch = [box for box in boxes if box[1] not in self._quantized]
        place_fallback(
            of_torch, self._records, self._layouts, self._half, self._staging_bytes, self._report, self._shared_records
        )
        quantized = [
            QuantizedBox(self._quantized[record], *box_of(item)[::2], target)
            for item, record, target in boxes
            if record in self._quantized
        ]
        if quantized:
            self._place_quantized(quantized)

    @cached_property
    def _dequantizer(self) -> Dequantizer:
        return Dequantizer(self._quantized.values(), self._half)

    def _quantized_batches(self, boxes: Sequence[CutBox], device: int | None, phase: Phase) -> _QuantizedBatches:
        return self._shared.batches(
            partial(batches_of_parts, boxes),
            sum(box.most_bytes() for box in boxes),
            self._dequantizer.batch,
            device,
            self._dequantizer.layouts,
            self._half,
            self._dequantizer.paths,
            phase,
        )

    def _place_quantized(self, boxes: list[QuantizedBox]) -> None:
        self._report.dequantized_items += len(boxes)
        self._count_refused([box.target for box in boxes])
        if self._shared.wants_quantized:
            boxes = self._share_quantized(boxes)
        for stats in self._dequantizer.place(boxes, self._staging_bytes // 2, self._cuda):
            self._report.bytes_needed += stats.bytes_placed
            count_stats(self._report, stats)

    def _share_quantized(self, boxes: list[QuantizedBox]) -> list[QuantizedBox]:
        """Place boxes together with other ranks. Returns those that this rank is to read alone."""
        shared = SharedBoxes(boxes, self._dequantizer.records, self._shared.most_bytes)
        batches = [
            self._quantized_batches(of_device, device, Phase.QUANTIZED_BATCHES)
            for device, of_device in cut_by_device(shared.others).items()
        ]
        self._shared.begin_quantized(sum(map(len, batches)))
        alone = [] if len(shared) == 0 or self._place_as_they_arrive(shared) else shared.boxes
        try:
            with typed_errors(self._dequantizer.fqns):
                for of_device in batches:
                    for batch in of_device:
                        self._report.bytes_needed += batch.empty(self._half, self._cuda)
        except CudaRefusedError:
            self._shared.decline("a driver refuses what it takes to dequantize")
            raise
        return alone

    def _place_as_they_arrive(self, boxes: SharedBoxes) -> bool:
        boxes.allocate()
        layouts, paths = self._dequantizer.layouts, self._dequantizer.paths
        with typed_errors(self._dequantizer.fqns):
            scales = boxes.scales(layouts)
            if not self._shared.place_quantized(layouts, paths, scales, boxes.elements(), self._half):
                return False
        self._report.bytes_needed += scales.bytes_needed + boxes.bytes_needed
        return True

    def _count_refused(self, targets: Sequence[torch.Tensor]) -> None:
        """Count those that torch brings to their device, as its driver refuses what the engine needs."""
        for target in targets:
            if (device := device_of(target)) is not None and served_device(target) is None:
                self._report.device_fallback_items += 1
                self._report.device_fallback_reason = refusals[device]


def _arriving(batches: SharedBatches[Part[StoredBox], Batch[StoredBox]]) -> Iterator[tuple[Sequence[Piece], int]]:
    for batch in batches:
        parts = zip(batch.parts, batch.sources, strict=True)
        pieces = [(part.box, part.offsets, part.lengths, source) for part, source in parts]
        yield pieces, sum(source.nbytes for source in batch.sources)


def _pick(items: Sequence[ReadItem], indices: Sequence[int]) -> Iterator[tuple[int, ReadItem]]:
    """Items with their indices. Each is asked for once, as it may be made when it is."""
    return ((i, items[i]) for i in indices)
