"""Dequantization: boxes of quantized tensors become numbers on their way to their targets.

A box is cut into parts along the edges of blocks (quantized_parts.py). A batch of parts and their scales is read into a
buffer, and multiplied from there into the targets. So each scale is read once, unless a block is larger than the
buffer, or two boxes share it, and no memory is needed for the scales of whole tensors.

- For targets in host memory, and on devices that the engine cannot write to, the buffer is a bounce buffer of each
  reader thread (bounce.py). The thread reads a batch and dequantizes it at once, while it is still in the cache.
- For targets on a CUDA device, the buffer is staging memory on that device, and a kernel dequantizes. It has two
  halves: one batch arrives in one of them while the batch before is dequantized, which lies in the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from operator import mul

import torch

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.errors import typed_errors
from dcp_fast.observe.trace import span
from dcp_fast.transfer.bounce import check_internal_overlap, copy_on_host, is_on_host, place_in_threads
from dcp_fast.transfer.destinations import DTYPES, HOST
from dcp_fast.transfer.gpu import CudaLoad
from dcp_fast.transfer.quantized_parts import (
    Areas,
    CutBox,
    Part,
    QuantizedBox,
    batches_of_parts,
    itemsize_of,
    may_overlap,
)
from dcp_fast.transfer.quantized_tensors import MXFP4, QuantizedTensor, StoredTensor

_Copies = list[tuple[torch.Tensor, torch.Tensor]]


class Dequantizer:
    """Reads and dequantizes boxes.

    Args:
        tensors: all that boxes may be of.
        options: for the native reads.

    Attributes:
        layouts: of elements and scales.
        records: the number of each stored tensor in the layouts.
        fqns: of each of these.
        paths: of the files of the layouts.

    Raises:
        LoadError: a file cannot be read.
    """

    def __init__(self, tensors: Iterable[QuantizedTensor], options: _native.Options) -> None:
        self._options = options
        self.records: dict[StoredTensor, int] = {}
        files: dict[str, int] = {}
        rows, payloads = array("q"), array("q")
        for tensor in tensors:
            for stored in (tensor.stored, tensor.scales):
                if stored in self.records:
                    continue
                self.records[stored] = len(self.records)
                file = files.setdefault(stored.path, len(files))
                rows.extend((file, stored.offset, stored.length, 0))
                payloads.extend((stored.code, len(stored.sizes), *stored.sizes))
        self.paths = list(files)
        self.fqns = [stored.fqn for stored in self.records]
        with typed_errors(self.fqns):
            self.layouts = _native.open_files(list(files), rows, options, payloads)

    def place(self, boxes: Sequence[QuantizedBox], buffer_bytes: int, cuda: CudaLoad) -> list[_native.Stats]:
        """Read boxes, dequantize them and bring them to their targets, no two of which may share memory.

        Args:
            boxes: in the order in which they are read.
            buffer_bytes: host memory for the bounce buffers of all threads together.
            cuda: brings boxes to GPUs.

        Returns:
            What was read, batch by batch; ``bytes_placed`` are those of stored elements and scales.

        Raises:
            LoadError: a file cannot be read, or a box does not fit.
            RuntimeError: several elements of a target share memory, as ``copy_`` raises.
            CudaRefusedError, NativeError: as ``CudaLoad.run``.
        """
        stats: list[_native.Stats] = []
        with typed_errors(self.fqns):
            for device, of_device in cut_by_device(boxes).items():
                if device is None:
                    stats += self._place_through_host(of_device, buffer_bytes, cuda)
                else:
                    stats.append(self._place_through_device(device, of_device, cuda))
        return stats

    def _place_through_host(self, boxes: Sequence[CutBox], buffer_bytes: int, cuda: CudaLoad) -> list[_native.Stats]:
        def place(parts: Sequence[Part], buffer: torch.Tensor, options: _native.Options) -> _native.Stats:
            batch = self.batch(parts, buffer, HOST)
            stats = batch.program(self.layouts).run(0, options)
            batch.empty(options, cuda)
            return stats

        at_once = all(is_on_host(box.target) and not may_overlap(box.target) for box in boxes)
        threads = self.layouts.threads(self._options) if at_once else 1
        batches_of = partial(batches_of_parts, boxes)
        return place_in_threads(batches_of, place, threads, self._options, buffer_bytes)

    def batch(self, parts: Sequence[Part], buffer: torch.Tensor, device: int) -> QuantizedBatch:
        """A batch that reads from the layouts."""
        return QuantizedBatch(parts, self.records, buffer, device)

    def _place_through_device(self, device: int, boxes: Sequence[CutBox], cuda: CudaLoad) -> _native.Stats:
        halves = cuda.halves(device, sum(box.most_bytes() for box in boxes))
        parts = batches_of_parts(boxes, halves[0].numel())
        batches = [self.batch(batch, halves[i % 2], device) for i, batch in enumerate(parts)]

        def place(i: int) -> None:
            batches[i].empty(self._options, cuda)

        programs = [batch.program(self.layouts) for batch in batches]
        return cuda.run_in_turns(programs, self._options, device, place)


def cut_by_device(boxes: Sequence[QuantizedBox]) -> dict[int | None, list[CutBox]]:
    """Boxes by the CUDA device whose kernel dequantizes them; None: the host does.

    Raises:
        LoadError: a box does not fit.
        RuntimeError: several elements of a target share memory, as ``copy_`` raises.
    """
    found: dict[int | None, list[CutBox]] = {}
    for box in boxes:
        box.check()
        check_internal_overlap(box.target)
        cut = CutBox(box)
        found.setdefault(cut.device, []).append(cut)
    return found


class QuantizedBatch:
    """A batch in a buffer: the transfer program that fills it, and what is done with it then.

    Args:
        parts: what it consists of.
        records: the number of each stored tensor in the layouts.
        buffer: bytes that have room for it.
        device: where the buffer lies, as in destinations.py.

    Attributes:
        staged: of what torch brings to a target the box, offsets and lengths in it, and where it is in the buffer.
        bytes: that are stored of it.
    """

    def __init__(
        self, parts: Sequence[Part], records: Mapping[StoredTensor, int], buffer: torch.Tensor, device: int
    ) -> None:
        self._widenings: _Copies = []  # targets, and sources in the buffer, before anything is dequantized
        self._rows = array("q")  # for _native.dequantize
        self.staged: list[tuple[CutBox, Sequence[int], Sequence[int], torch.Tensor]] = []
        self._records = records
        self._device = device
        self._items, self._destinations = array("q"), array("q")  # rows for _native.Program
        self._reads = 0
        self.bytes = 0
        begin = 0
        for part in parts:
            self._add(part, buffer[begin : begin + part.size])
            begin += part.size

    def program(self, layouts: _native.Layouts) -> _native.Program:
        program = _native.Program(layouts, self._items, self._destinations)
        # What was left out would be dequantized from memory that nobody filled.
        assert not program.converted(0)
        assert not program.fallback(0)
        return program

    def empty(self, options: _native.Options, cuda: CudaLoad) -> int:
        """Dequantize what a filled buffer has, and bring it to its targets. Returns how many bytes were stored of it.

        Args:
            options, cuda: as of :meth:`dequantize`.
        """
        self.dequantize(options, cuda)
        copies = [
            (narrow_tensor_by_index(box.target, offsets, lengths), source)
            for box, offsets, lengths, source in self.staged
        ]
        if self._device == HOST:
            copy_on_host(copies)
        else:
            for target, source in copies:
                target.copy_(source)
        return self.bytes

    def dequantize(self, options: _native.Options, cuda: CudaLoad) -> None:
        """Dequantize what a filled buffer has, to where targets are or to where torch takes it from.

        Args:
            options: whose recorder notes the time on the host.
            cuda: has the kernel of a device, which does it there, on torch's current stream.
        """
        if self._device == HOST:
            with span(options.recorder, "dequantize", self.bytes):
                _native.dequantize(self._rows)
            return
        for target, source in self._widenings:
            target.copy_(source)
        cuda.dequantize(self._device, self._rows)

    def _add(self, part: Part, memory: torch.Tensor) -> None:
        """Add a part. ``memory`` is its piece of the buffer."""
        box, tensor = part.box, part.box.tensor
        areas = box.areas(part.rows, part.columns)
        starts = Areas(*accumulate(areas[:-1], initial=0))
        address = memory.data_ptr()
        block_rows, block_columns = tensor.block
        first_block, row_block = part.column // block_columns, part.row // block_rows
        blocks = -(-(part.column + part.columns) // block_columns) - first_block
        rows_of_blocks = -(-(part.row + part.rows) // block_rows) - row_block
        leading = tuple(map(sum, zip(box.offsets, part.leading, strict=False)))
        ones = (1,) * len(leading)
        # Of tensors with one dimension there is only one row, which no offset names.
        has_rows = box.dims > 1
        row, height = ((part.row,), (part.rows,)) if has_rows else ((), ())

        if tensor.code == MXFP4:
            row_bytes = blocks * tensor.block_bytes
            offsets: tuple[int, ...] = (*leading, *row, first_block, 0)
            lengths: tuple[int, ...] = (*ones, *height, blocks, tensor.block_bytes)
        else:
            row_bytes = part.columns * box.itemsize
            offsets, lengths = (*leading, *row, part.column), (*ones, *height, part.columns)
        self._read(tensor.stored, tensor.stored.code, offsets, lengths, address + starts.elements)
        elements_at, scales_at = starts.elements, starts.scales
        if box.widens_elements:
            elements_at = starts.wide_elements
            row_bytes = part.columns * torch.float32.itemsize
            self._widen(tensor.stored.code, prod(lengths), memory[starts.elements :], memory[elements_at:])
        offsets = (*leading, row_block, first_block) if has_rows else (first_block,)
        lengths = (*ones, rows_of_blocks, blocks) if has_rows else (blocks,)
        self._read(tensor.scales, box.scale_code, offsets, lengths, address + starts.scales)
        if box.widens_scales:
            scales_at = starts.wide_scales
            self._widen(box.scale_code, prod(lengths), memory[starts.scales :], memory[scales_at:])

        begin = (*part.leading, *((part.row - box.offsets[-2],) if has_rows else ()), part.column - box.offsets[-1])
        if box.is_staged:
            lengths, dtype = (*ones, *height, part.columns), tensor.target_dtype
            staged = memory[starts.staged :][: prod(lengths) * dtype.itemsize].view(dtype).view(lengths)
            self.staged.append((box, begin, lengths, staged))
            to, itemsize, row_stride, column_stride = address + starts.staged, dtype.itemsize, part.columns, 1
        else:
            strides, itemsize = box.target.stride(), box.target.dtype.itemsize
            to = box.target.data_ptr() + itemsize * sum(map(int.__mul__, begin, strides))
            row_stride, column_stride = (0, *strides)[-2:]
        self._rows.extend((box.code, tensor.has_exponents, box.target_code, box.result_code, part.rows, part.columns))
        self._rows.extend((address + elements_at, row_bytes, address + scales_at, blocks, block_rows, block_columns))
        self._rows.extend((part.row % block_rows, part.column % block_columns, to))
        self._rows.extend((row_stride * itemsize, column_stride * itemsize))

    def _read(self, stored: StoredTensor, code: int, offsets: Sequence[int], lengths: Sequence[int], to: int) -> None:
        """Have a box of a stored tensor read to an address, in the dtype of that code."""
        dims = len(lengths)
        self._items.extend((self._records[stored], self._reads, dims, *offsets, *(0,) * dims, *lengths))
        strides = [*accumulate(lengths[:0:-1], mul, initial=1)][::-1]
        self._destinations.extend((to, self._device, code, itemsize_of(code), dims, *lengths, *strides))
        self._reads += 1
        self.bytes += prod(lengths) * itemsize_of(code)

    def _widen(self, code: int, count: int, memory: torch.Tensor, wide: torch.Tensor) -> None:
        """Have so many elements at the begin of one piece of memory become float32 at that of another."""
        dtype = DTYPES[code]
        assert dtype is not None  # else there is no conversion of it to float32
        source = memory[: count * dtype.itemsize].view(dtype)
        self._widenings.append((wide[: count * torch.float32.itemsize].view(torch.float32), source))
