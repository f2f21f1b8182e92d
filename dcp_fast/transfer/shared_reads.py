"""What a transfer reads together with other ranks. The phases of that are in sharing.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast.errors import CudaError
from dcp_fast.observe.report import LoadReport, count_stats
from dcp_fast.transfer.destinations import HOST
from dcp_fast.transfer.gpu import CudaLoad, CudaRefusedError
from dcp_fast.transfer.record_rows import RecordRows
from dcp_fast.transfer.shared_batches import SharedBatches
from dcp_fast.transfer.shared_records import SharedRecords, batches_of_records
from dcp_fast.transfer.sharing import ExchangeStep, Phase, Received, Sending, Sharing
from dcp_fast.transfer.staging_memory import allocate


class _Batch(Protocol):
    def program(self, layouts: _native.Layouts) -> _native.Program: ...


PartT = TypeVar("PartT")
BatchT = TypeVar("BatchT", bound=_Batch)

# Headers lie at both ends of records. It pays a rank that reads alone to read through small payloads; but here these
# would be sent to all ranks, and be read once more.
_MOST_HEADER_GAP = 8 << 10
_OF_QUANTIZED = 2  # exchanges: scales, and elements
_GONE = "records that are read as a whole were wanted again, or in another order, and were then read alone"


class SharedReads:
    """One transfer's use of the exchange with other ranks, if there is one.

    Args:
        exchange: with the other ranks; None if nobody shares.
        cuda: brings bytes to destinations on GPUs.
        report: counts what is read.
        prepare_alone: called before the first time that all ranks read alone what they were to share.
    """

    def __init__(
        self, exchange: Sharing | None, cuda: CudaLoad, report: LoadReport, prepare_alone: Callable[[], None]
    ) -> None:
        self._prepare_alone: Callable[[], None] | None = prepare_alone
        self._exchange = exchange  # until this rank has taken part in all
        self._has_boxes = False
        self._has_quantized = False
        self._left_out: set[int] = set()  # records for which there was no memory in the first exchange
        self._whole: set[int] = set()  # records that were to come in it
        self._cuda = cuda
        self._report = report
        self._names: list[str] = []
        self._error: BaseException | None = None  # of an exchange: there is nothing to try again

    @property
    def is_wanted(self) -> bool:
        """Whether there is an exchange of boxes that this rank has yet to take part in."""
        return self._exchange is not None and not self._has_boxes

    @property
    def wants_quantized(self) -> bool:
        """Whether there are exchanges of quantized tensors that this rank has yet to take part in."""
        return self._exchange is not None and not self._has_quantized

    @property
    def most_bytes(self) -> int:
        """Memory for what is received and kept."""
        return 0 if self._exchange is None else self._exchange.most_bytes

    def get_records(
        self,
        layouts: _native.Layouts,
        rows: RecordRows,
        paths: Sequence[str],
        quantized: Collection[int],
        options: _native.Options,
    ) -> _native.Options:
        """Get headers, bytes entries and records with a transform, which layouts then take from memory.

        Those that do not fit into memory are for :meth:`records`.

        Returns:
            Options with which the layouts are to read headers: what has arrived was cut as these do.

        Args:
            layouts: whose headers are yet to be read.
            rows: of the records.
            paths: of their files.
            quantized: records that are read in another way.
            options: for reading.
        """
        if self._exchange is None:
            return options
        if quantized:
            self._exchange.expect(Phase.QUANTIZED, _OF_QUANTIZED)
        self._names = _names_of(rows.files, paths, self._exchange)
        of_headers = options.joining(_MOST_HEADER_GAP)
        whole = [i for i, is_whole in enumerate(rows.rows[3::4]) if is_whole and i not in quantized]
        find = partial(_native.Need.of_headers, layouts, whole, self._exchange.most_bytes, self._names, of_headers)
        need = self._share(self._exchange, Phase.HEADERS, layouts, find, of_headers, ())
        self._whole = set(whole)
        if need is None:
            return options
        _native.keep(layouts, need)
        self._left_out = set(need.left_out)
        if need.bytes_left_out > 0:
            self._report.note_reads_alone(f"{need.bytes_left_out} bytes of headers do not fit into exchange_bytes")
        return of_headers

    def bytes_entries(
        self, records: Iterable[int], layouts: _native.Layouts, rows: RecordRows, options: _native.Options
    ) -> SharedRecords:
        """Batches of bytes entries, as :meth:`records` has them, in exchanges behind all others."""
        entries = self.records(records, layouts, rows, options, Phase.BYTES)
        if self._exchange is not None:
            self._exchange.expect(Phase.BYTES, len(entries))
        return entries

    def records(
        self,
        records: Iterable[int],
        layouts: _native.Layouts,
        rows: RecordRows,
        options: _native.Options,
        phase: Phase = Phase.BATCHES,
    ) -> SharedRecords:
        """Batches of whole records that are yet to arrive, each in an exchange of its own.

        Args:
            records: bytes entries and records that only torch can read, in the order in which they are read. Those that
                have arrived already are left out.
            layouts, rows: of all records.
            options: for reading.
            phase: of the exchanges.
        """
        wanted = [record for record in records if record in self._left_out or record not in self._whole]
        if self._exchange is None:
            wanted = []

        def fetch(batch: Sequence[int]) -> Callable[[], None] | None:
            if self._exchange is None:
                return None
            find = partial(_native.Need.of_records, layouts, batch, self._names)
            need = self._share(self._exchange, phase, layouts, find, options, ())
            if need is None:
                return None
            _native.keep(layouts, need)
            return partial(_native.drop, layouts, need)

        batches = list(batches_of_records(wanted, rows.length_of, self.most_bytes))
        return SharedRecords(batches, fetch, lambda: self._report.note_reads_alone(_GONE))

    def place_boxes(
        self,
        layouts: _native.Layouts,
        program: _native.Program,
        wave: int,
        options: _native.Options,
        devices: Collection[int],
        more: int,
    ) -> bool:
        """Place the boxes of a wave.

        Args:
            layouts: of the program.
            program, wave: what this rank needs.
            options: for reading.
            devices: ordinals of the GPUs that it has destinations on.
            more: how many exchanges of :meth:`batches`, :meth:`records` and other waves this rank needs after this one,
                unless it has said so.

        Returns:
            Whether they are in place. If not, this rank is to read them alone.

        Raises:
            CudaRefusedError: a load can only be run with destinations elsewhere. The exchange is yet to come.
        """
        if self._exchange is None:
            return False
        if devices:
            self._cuda.prepare(devices)
        if more:
            self._exchange.expect(Phase.BATCHES, more)
        phase = Phase.BATCHES if self._has_boxes else Phase.BOXES
        find = partial(_native.Need.of_program, program, wave, self._names)
        need = self._share(self._exchange, phase, layouts, find, options, devices)
        self._has_boxes = True
        if need is None:
            return False
        self._report.staged_items += need.converted_items
        return True

    def batches(
        self,
        cut: Callable[[int], Iterator[Sequence[PartT]]],
        wanted: int,
        make: Callable[[Sequence[PartT], torch.Tensor, int], BatchT],
        device: int | None,
        layouts: _native.Layouts,
        options: _native.Options,
        paths: Sequence[str] = (),
        phase: Phase = Phase.BATCHES,
    ) -> SharedBatches[PartT, BatchT]:
        """Batches each of which arrives in an exchange of its own.

        Args:
            cut: the parts of all batches, for buffers of so many bytes.
            wanted: bytes of a buffer that has room for all parts.
            make: a batch of parts, for a buffer on a device, as destinations.py names it.
            device: that buffers lie on, as an ordinal; None: the host.
            layouts: that batches read from.
            options: for reading.
            paths: of the files of these layouts, unless they are those of :meth:`get_records`.
            phase: of the exchanges.
        """
        names = _names_of(paths, paths, self._exchange) if paths and self._exchange is not None else self._names
        size = min(wanted, self.most_bytes) if device is None else self._cuda.half_bytes(wanted)

        def buffers() -> Sequence[torch.Tensor]:
            if device is None:
                # On the CPU, though the caller may have made another device the default one.
                return [allocate(size, torch.device("cpu"))]
            return self._cuda.halves(device, wanted)

        def fill(parts: Sequence[PartT], buffer: torch.Tensor) -> BatchT:
            batch = make(parts, buffer, HOST if device is None else device)
            self._fill(phase, batch.program(layouts), layouts, names, options, () if device is None else (device,))
            return batch

        return SharedBatches(list(cut(size)), buffers, device, fill)

    def _fill(
        self,
        phase: Phase,
        program: _native.Program,
        layouts: _native.Layouts,
        names: Sequence[str],
        options: _native.Options,
        devices: Collection[int],
    ) -> None:
        if self._exchange is not None:
            find = partial(_native.Need.of_program, program, 0, names)
            if self._share(self._exchange, phase, layouts, find, options, devices) is not None:
                return
        run = self._cuda.run(program, 0, options, devices) if devices else program.run(0, options)
        count_stats(self._report, run)

    def begin_quantized(self, batches: int) -> None:
        """Begin with quantized tensors. This rank has so many :meth:`batches` of them arrive."""
        self._has_quantized = True
        if self._exchange is not None:
            self._exchange.expect(Phase.QUANTIZED_BATCHES, batches)

    def place_quantized(
        self,
        layouts: _native.Layouts,
        paths: Sequence[str],
        scales: _native.Program,
        elements: Buffer,
        options: _native.Options,
    ) -> bool:
        """Get scales, and then place elements that are dequantized as they arrive. After :meth:`begin_quantized`.

        Args:
            layouts: of the stored tensors.
            paths: of their files.
            scales: brings the scales to where the elements expect them.
            elements: as ``_native.Need.of_quantized`` has them.
            options: for reading.

        Returns:
            Whether they are in place. If not, this rank is to read them alone.
        """
        exchange = self._exchange
        if exchange is None:
            return False
        names = _names_of(paths, paths, exchange)
        find = partial(_native.Need.of_program, scales, 0, names)
        if self._share(exchange, Phase.QUANTIZED, layouts, find, options, ()) is None:
            return False
        find = partial(_native.Need.of_quantized, layouts, elements, names)
        return self._share(exchange, Phase.QUANTIZED, layouts, find, options, ()) is not None

    def forget(self) -> None:
        """Let go of what an error knows of, and of the transfer. Nothing is read any more."""
        self._error = self._prepare_alone = None

    def decline(self, reason: str) -> None:
        """Take part in what exchanges of all other ranks are left, but read alone what this rank needs of them."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.decline(reason)

    def _share(
        self,
        ranks: Sharing,
        phase: Phase,
        layouts: _native.Layouts,
        find: Callable[[], _native.Need],
        options: _native.Options,
        devices: Collection[int],
    ) -> _native.Need | None:
        """Read what this rank needs together with other ranks. Returns it, or None if each reads alone.

        Raises:
            Exception: an exchange failed, this one or an earlier one.
        """
        if self._error is not None:
            raise self._error
        need: _native.Need | None = None

        def found() -> tuple[_native.Need, ExchangeStep]:
            nonlocal need
            need = find()
            return need, step

        def step(exchange: _native.Exchange, send: Sending | None, receive: Received | None) -> _native.RoundStats:
            assert need is not None
            to_place = None if receive is None else (receive.round, receive.address, receive.size)
            on_device = None if receive is None else receive.on_device
            run = partial(exchange.step, need, layouts, send, to_place, options, on_device=on_device)
            try:
                stats = self._cuda.run_step(run, options, devices) if devices else run(None, {})
            except CudaRefusedError as error:  # too late for another way
                raise CudaError(str(error)) from None
            count_stats(self._report, stats.placed)
            self._report.requests += stats.requests
            self._report.bytes_read += stats.bytes_read
            return stats

        try:
            if ranks.share(phase, found):
                return need
        except BaseException as error:
            self._error = error
            raise
        prepare, self._prepare_alone = self._prepare_alone, None
        if prepare is not None:
            prepare()
        return None


def _names_of(files: Sequence[str], paths: Sequence[str], exchange: Sharing) -> list[str]:
    """What ranks know files by: names, relative to the checkpoint or absolute, and what tells them from other files."""
    ids = [exchange.save_id or str(os.stat(path).st_ino) for path in paths]
    return [f"{file} ({number})" for file, number in zip(files, ids, strict=True)]
