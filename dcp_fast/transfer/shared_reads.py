"""What a transfer reads together with other ranks.

Exchanges come in this order on all ranks:

1. headers, bytes entries and whole records,
2. boxes that the engine places,
3. boxes that torch places, one batch after another (shared_batches.py), and boxes that are written over others,
4. scales of quantized tensors, and elements that are dequantized as they arrive (shared_quantized.py),
5. scales and elements that are dequantized batch by batch (dequantization.py).

Of 3 and 5 there are as many as the rank that needs most of them has, and 4 is there if any rank has quantized tensors.
A rank that needs less takes part without needing anything, so that what several ranks need comes to all of them in the
same exchange.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
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
from dcp_fast.transfer.sharing import ExchangeStep, Received, Sending, Sharing
from dcp_fast.transfer.staging_memory import allocate


class _Batch(Protocol):
    def program(self, layouts: _native.Layouts) -> _native.Program: ...


PartT = TypeVar("PartT")
BatchT = TypeVar("BatchT", bound=_Batch)

_OF_QUANTIZED = 2  # exchanges: scales, and elements


class SharedReads:
    """One transfer's use of the exchange with other ranks, if there is one.

    Args:
        exchange: with the other ranks; None if nobody shares.
        cuda: brings bytes to destinations on GPUs.
        report: counts what is read.
    """

    def __init__(self, exchange: Sharing | None, cuda: CudaLoad, report: LoadReport) -> None:
        self._exchange = exchange  # until this rank has taken part in all
        self._has_boxes = False
        self._cuda = cuda
        self._report = report
        self._names: list[str] = []

    @property
    def is_wanted(self) -> bool:
        """Whether there is an exchange of boxes that this rank has yet to take part in."""
        return self._exchange is not None and not self._has_boxes

    @property
    def goes_on(self) -> bool:
        """Whether there may be any exchanges that this rank has yet to take part in."""
        return self._exchange is not None

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
    ) -> None:
        """Get headers, bytes entries and records that torch reads, which layouts then take from memory.

        Args:
            layouts: whose headers are yet to be read.
            rows: of the records.
            paths: of their files.
            quantized: records that are read in another way.
            options: for reading.
        """
        if self._exchange is None:
            return
        if quantized:
            self._exchange.expect(_OF_QUANTIZED)
        self._names = _names_of(rows.files, paths, self._exchange)
        whole = [i for i, is_whole in enumerate(rows.rows[3::4]) if is_whole and i not in quantized]
        find = partial(_native.Need.of_records, layouts, whole, self._exchange.most_bytes, self._names, options)
        need = self._share(self._exchange, layouts, find, options, ())
        if need is not None:
            _native.keep(layouts, need)

    def place_boxes(
        self,
        layouts: _native.Layouts,
        program: _native.Program,
        wave: int,
        options: _native.Options,
        devices: Collection[int],
        more: int,
    ) -> bool:
        """Place the boxes of a wave, and get records that only torch can read, if it is the first one.

        Args:
            layouts: of the program.
            program, wave: what this rank needs.
            options: for reading.
            devices: ordinals of the GPUs that it has destinations on.
            more: how many exchanges of :meth:`batches` and other waves this rank needs after this one, unless it has
                said so.

        Returns:
            Whether they are in place. If not, this rank is to read them alone.

        Raises:
            CudaRefusedError: a load can only be run with destinations elsewhere. The exchange is yet to come.
        """
        if self._exchange is None:
            return False
        if devices:
            self._cuda.prepare(devices)
        self._exchange.expect(more)
        most_bytes = 0 if self._has_boxes else self._exchange.most_bytes
        find = partial(_native.Need.of_program, program, wave, most_bytes, self._names)
        need = self._share(self._exchange, layouts, find, options, devices)
        self._has_boxes = True
        if need is None:
            return False
        _native.keep(layouts, need)
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
            self._fill(batch.program(layouts), layouts, names, options, () if device is None else (device,))
            return batch

        return SharedBatches(list(cut(size)), buffers, device, fill)

    def _fill(
        self,
        program: _native.Program,
        layouts: _native.Layouts,
        names: Sequence[str],
        options: _native.Options,
        devices: Collection[int],
    ) -> None:
        if self._exchange is not None:
            find = partial(_native.Need.of_program, program, 0, 0, names)
            if self._share(self._exchange, layouts, find, options, devices) is not None:
                return
        run = self._cuda.run(program, 0, options, devices) if devices else program.run(0, options)
        count_stats(self._report, run)

    def begin_quantized(self, batches: int, places: bool) -> None:
        """Begin with quantized tensors, when all other ranks do.

        Args:
            batches: how many :meth:`batches` of them this rank has arrive.
            places: whether it calls :meth:`place_quantized` before.
        """
        if self._exchange is not None:
            self._exchange.skip(self._exchange.left - _OF_QUANTIZED)  # batches of ranks that have more of them
            self._exchange.expect(batches)
            if not places:
                self._exchange.skip(_OF_QUANTIZED)

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
        find = partial(_native.Need.of_program, scales, 0, 0, names)
        if self._share(exchange, layouts, find, options, ()) is None:
            exchange.skip(1)
            return False
        find = partial(_native.Need.of_quantized, layouts, elements, names)
        return self._share(exchange, layouts, find, options, ()) is not None

    def decline(self, reason: str) -> None:
        """Take part in what exchanges of all other ranks are left, but read alone what this rank needs of them."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.decline(reason)

    def _share(
        self,
        ranks: Sharing,
        layouts: _native.Layouts,
        find: Callable[[], _native.Need],
        options: _native.Options,
        devices: Collection[int],
    ) -> _native.Need | None:
        """Read what this rank needs together with other ranks. Returns it, or None if each reads alone."""
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

        if not ranks.share(found):
            return None
        if need is not None and need.bytes_left_out > 0:
            reason = f"{need.bytes_left_out} bytes of records that come whole do not fit into exchange_bytes"
            self._report.note_reads_alone(reason)
        return need


def _names_of(files: Sequence[str], paths: Sequence[str], exchange: Sharing) -> list[str]:
    """What ranks know files by: names, relative to the checkpoint or absolute, and what tells them from other files."""
    ids = [exchange.save_id or str(os.stat(path).st_ino) for path in paths]
    return [f"{file} ({number})" for file, number in zip(files, ids, strict=True)]
