"""What a transfer reads together with other ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from typing_extensions import Buffer

from dcp_fast import _native
from dcp_fast.errors import CudaError
from dcp_fast.observe.report import LoadReport, count_stats
from dcp_fast.transfer.gpu import CudaLoad, CudaRefusedError
from dcp_fast.transfer.record_rows import RecordRows
from dcp_fast.transfer.sharing import ExchangeStep, Received, Sending, Sharing


class SharedReads:
    """One transfer's use of the exchange with other ranks, if there is one.

    Args:
        exchange: with the other ranks; None if nobody shares.
        cuda: brings bytes to destinations on GPUs.
        report: counts what is read.
    """

    def __init__(self, exchange: Sharing | None, cuda: CudaLoad, report: LoadReport) -> None:
        self._exchange = exchange  # until this rank has taken part in that of boxes
        self._of_quantized: Sharing | None = None  # from then on, until it has taken part in all
        self._cuda = cuda
        self._report = report
        self._names: list[str] = []

    @property
    def is_wanted(self) -> bool:
        """Whether there is an exchange that this rank has yet to take part in."""
        return self._exchange is not None

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
            self._exchange.expect_quantized()
        self._names = _names_of(rows.files, paths, self._exchange)
        whole = [i for i, is_whole in enumerate(rows.rows[3::4]) if is_whole and i not in quantized]
        find = partial(_native.Need.of_records, layouts, whole, self._exchange.most_bytes, self._names, options)
        need = self._share(self._exchange, layouts, find, options, ())
        if need is not None:
            _native.keep(layouts, need)

    def place_boxes(
        self, layouts: _native.Layouts, program: _native.Program, options: _native.Options, devices: Collection[int]
    ) -> bool:
        """Place the boxes of a program's first wave, and get records of it that only torch can read.

        Args:
            layouts: of the program.
            program: what this rank needs.
            options: for reading.
            devices: ordinals of the GPUs that it has destinations on.

        Returns:
            Whether they are in place. If not, this rank is to read them alone.

        Raises:
            CudaRefusedError: a load can only be run with destinations elsewhere. The exchange is yet to come.
        """
        if self._exchange is None:
            return False
        if devices:
            self._cuda.prepare(devices)
        find = partial(_native.Need.of_program, program, self._exchange.most_bytes, self._names)
        need = self._share(self._exchange, layouts, find, options, devices)
        self._exchange, self._of_quantized = None, self._exchange
        if need is None:
            return False
        _native.keep(layouts, need)
        self._report.staged_items += need.converted_items
        return True

    @property
    def is_wanted_for_quantized(self) -> bool:
        """Whether there are exchanges of quantized tensors that this rank has yet to take part in."""
        return self._of_quantized is not None

    @property
    def most_bytes(self) -> int:
        """Memory for what is received and kept."""
        exchange = self._exchange or self._of_quantized
        return 0 if exchange is None else exchange.most_bytes

    def place_quantized(
        self,
        layouts: _native.Layouts,
        paths: Sequence[str],
        scales: _native.Program,
        elements: Buffer,
        options: _native.Options,
    ) -> bool:
        """Get scales, and then place elements that are dequantized as they arrive.

        Args:
            layouts: of the stored tensors.
            paths: of their files.
            scales: brings the scales to where the elements expect them.
            elements: as ``_native.Need.of_quantized`` has them.
            options: for reading.

        Returns:
            Whether they are in place. If not, this rank is to read them alone.
        """
        exchange, self._of_quantized = self._of_quantized, None
        if exchange is None:
            return False
        names = _names_of(paths, paths, exchange)
        find = partial(_native.Need.of_program, scales, exchange.most_bytes, names)
        if self._share(exchange, layouts, find, options, ()) is None:
            exchange.decline(self._report.sharing_fallback_reason)
            return False
        find = partial(_native.Need.of_quantized, layouts, elements, names)
        return self._share(exchange, layouts, find, options, ()) is not None

    def decline(self, reason: str) -> None:
        """Take part in what exchanges of all other ranks are left, but read alone what this rank needs of them."""
        exchange = self._exchange or self._of_quantized
        self._exchange = self._of_quantized = None
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
            to_send = None if send is None else (send.round, *_memory_of(send.memory))
            to_place = None if receive is None else (receive.round, *_memory_of(receive.memory))
            there = None if receive is None else receive.on_device
            on_device = None if there is None else (there.device.index, *_memory_of(there))
            run = partial(exchange.step, need, layouts, to_send, to_place, options, on_device=on_device)
            try:
                stats = self._cuda.run_step(run, options, devices) if devices else run(None, {})
            except CudaRefusedError as error:  # too late for another way
                raise CudaError(str(error)) from None
            count_stats(self._report, stats.placed)
            self._report.requests += stats.requests
            self._report.bytes_read += stats.bytes_read
            return stats

        return need if ranks.share(found) else None


def _names_of(files: Sequence[str], paths: Sequence[str], exchange: Sharing) -> list[str]:
    """What ranks know files by: names, relative to the checkpoint or absolute, and what tells them from other files."""
    ids = [exchange.save_id or str(os.stat(path).st_ino) for path in paths]
    return [f"{file} ({number})" for file, number in zip(files, ids, strict=True)]


def _memory_of(memory: torch.Tensor | None) -> tuple[int, int]:
    """Its address and its size."""
    return (0, 0) if memory is None else (memory.data_ptr(), memory.numel())
