"""Dequantization: boxes of quantized tensors become numbers on their way to their targets.

A box is cut into parts along the edges of blocks. Each reader thread reads a batch of parts and their scales into its
bounce buffer (bounce.py), and multiplies them into their targets while they are in the cache. So each scale is read
once, unless a block is larger than the buffer, or two boxes share it, and no memory is needed for the scales of whole
tensors.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.errors import SizeMismatchError, typed_errors
from dcp_fast.observe.trace import span
from dcp_fast.transfer.batches import ALIGNMENT
from dcp_fast.transfer.bounce import check_internal_overlap, copy_on_host, is_on_host, place_in_threads
from dcp_fast.transfer.destinations import HOST, is_plain
from dcp_fast.transfer.quantized_tensors import CODES, MXFP4, QuantizedTensor, StoredTensor, code_of

__all__ = ["Dequantizer", "QuantizedBox"]

_FLOAT32 = CODES["float32"]


@dataclass
class QuantizedBox:
    """A box on its way from a quantized tensor to a target, which has its sizes.

    ``offsets`` are those of the box in the dequantized tensor.
    """

    tensor: QuantizedTensor
    offsets: Sequence[int]
    target: torch.Tensor

    def check(self) -> None:
        """Raise SizeMismatchError where the box does not lie in the tensor."""
        sizes, lengths = self.tensor.sizes, self.target.size()
        if len(sizes) != len(lengths) or any(
            offset < 0 or offset + length > size
            for offset, length, size in zip(self.offsets, lengths, sizes, strict=False)
        ):
            reason = (
                f"the box at {list(self.offsets)} of lengths {list(lengths)} exceeds the dequantized tensor of sizes "
                f"{list(sizes)}"
            )
            raise self.tensor.stored.error(SizeMismatchError, reason)


@dataclass(slots=True)
class _Part:
    """A part of a box, in its last two dimensions: rows and columns of the dequantized tensor.

    Attributes:
        leading: where it lies in the dimensions before those, from where the box begins.
        row, rows, column, columns: where it begins, from where the tensor begins, and how many it has.
        size: what it takes of a buffer, in bytes.
    """

    box: _Box
    leading: tuple[int, ...]
    row: int
    rows: int
    column: int
    columns: int
    size: int


class _Box:
    """A box, and how its parts are cut and placed.

    Attributes:
        is_staged: whether torch places what the engine has dequantized into the buffer.
    """

    def __init__(self, box: QuantizedBox) -> None:
        self.tensor = tensor = box.tensor
        self.target = box.target
        self.dims = len(tensor.sizes)
        self.offsets = tuple(box.offsets)
        self.lengths = tuple(box.target.size())
        self.code = code_of(box.target.dtype)
        self.target_code = code_of(tensor.target_dtype)
        self.is_staged = not (
            is_plain(self.target)
            and self.target.is_cpu
            and _native.can_dequantize(tensor.code, tensor.has_exponents, self.target_code, self.code)
        )
        self._staged_bytes = tensor.target_dtype.itemsize if self.is_staged else 0
        self.scale_bytes = 1 if tensor.has_exponents else 4
        self.itemsize = 1 if tensor.code == MXFP4 else _itemsize(tensor.code)

    def areas(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Bytes of a buffer for a part, at the most: stored elements, scales, and what is staged."""
        block_rows, block_columns = self.tensor.block
        across = columns // block_columns + 2
        if self.tensor.code == MXFP4:
            stored = rows * across * self.tensor.block_bytes
        else:
            stored = rows * columns * self.itemsize
        down = rows if block_rows == 1 else rows // block_rows + 2
        return (
            _aligned(stored),
            _aligned(down * across * self.scale_bytes),
            _aligned(rows * columns * self._staged_bytes),
        )

    def parts(self, capacity: int) -> Iterator[_Part]:
        """Cut the box into parts, each of which a buffer of so many bytes has room for."""
        if 0 in self.lengths:
            return
        rows, columns = (1, *self.lengths)[-2:]
        row, column = (0, *self.offsets)[-2:]
        block_rows, block_columns = self.tensor.block

        def most(limit: int, area: Callable[[int], tuple[int, int, int]]) -> int:
            """The largest number up to a limit whose area fits into the buffer, and 1 at least."""
            low, high = 1, limit
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if sum(area(middle)) <= capacity else (low, middle - 1)
            return low

        across = columns
        down = most(rows, lambda number: self.areas(number, across))
        if down < min(block_rows, rows) or sum(self.areas(down, across)) > capacity:
            down = min(block_rows, rows)
            across = most(columns, lambda number: self.areas(down, number))
            if across < min(block_columns, columns) or sum(self.areas(down, across)) > capacity:
                across = min(block_columns, most(columns, lambda number: self.areas(1, number)))
                down = most(down, lambda number: self.areas(number, across))
        for leading in itertools.product(*map(range, self.lengths[:-2])):
            for at, height in _pieces(row, rows, block_rows, down):
                for start, width in _pieces(column, columns, block_columns, across):
                    yield _Part(self, leading, at, height, start, width, sum(self.areas(height, width)))


class Dequantizer:
    """Reads and dequantizes boxes.

    Args:
        tensors: all that boxes may be of.
        options: for the native reads.

    Raises:
        LoadError: a file cannot be read.
    """

    def __init__(self, tensors: Iterable[QuantizedTensor], options: _native.Options) -> None:
        self._options = options
        self._records: dict[StoredTensor, int] = {}
        files: dict[str, int] = {}
        rows, payloads = array("q"), array("q")
        for tensor in tensors:
            for stored in (tensor.stored, tensor.scales):
                if stored in self._records:
                    continue
                self._records[stored] = len(self._records)
                file = files.setdefault(stored.path, len(files))
                rows.extend((file, stored.offset, stored.length, 0))
                payloads.extend((stored.code, len(stored.sizes), *stored.sizes))
        self._fqns = [stored.fqn for stored in self._records]
        with typed_errors(self._fqns):
            self._layouts = _native.open_files(list(files), rows, options, payloads)

    def place(self, boxes: Sequence[QuantizedBox], buffer_bytes: int) -> list[_native.Stats]:
        """Read boxes, dequantize them and bring them to their targets, no two of which may share memory.

        Args:
            boxes: in the order in which they are read.
            buffer_bytes: host memory for the bounce buffers of all threads together.

        Returns:
            What was read, batch by batch; ``bytes_placed`` are those of stored elements and scales.

        Raises:
            LoadError: a file cannot be read, or a box does not fit.
            RuntimeError: several elements of a target share memory, as ``copy_`` raises.
        """
        cut = []
        for box in boxes:
            box.check()
            check_internal_overlap(box.target)
            cut.append(_Box(box))
        at_once = all(is_on_host(box.target) and not _may_overlap(box.target) for box in boxes)
        threads = self._layouts.threads(self._options) if at_once else 1
        with typed_errors(self._fqns):
            return place_in_threads(partial(_batches, cut), self._place_batch, threads, self._options, buffer_bytes)

    def _place_batch(self, parts: Sequence[_Part], buffer: torch.Tensor, options: _native.Options) -> _native.Stats:
        items, destinations, rows = array("q"), array("q"), array("q")
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        begin = 0
        for number, part in enumerate(parts):
            self._add(part, 2 * number, buffer[begin : begin + part.size], items, destinations, rows, copies)
            begin += part.size
        program = _native.Program(self._layouts, items, destinations)
        stats = program.run(0, options)
        # What was left out would be dequantized from memory that nobody filled.
        assert not program.converted(0)
        assert not program.fallback(0)
        with span(options.recorder, "dequantize", stats.bytes_placed):
            _native.dequantize(rows)
            copy_on_host(copies)
        return stats

    def _add(
        self,
        part: _Part,
        destination: int,
        memory: torch.Tensor,
        items: array[int],
        destinations: array[int],
        rows: array[int],
        copies: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Add a part to the items and destinations of a program, to what is dequantized then, and to what torch copies.

        Args:
            part: what is added.
            destination: the number of the next one.
            memory: the part's piece of the buffer.
        """
        box, tensor = part.box, part.box.tensor
        address = memory.data_ptr()
        stored_size, scales_size, _ = box.areas(part.rows, part.columns)
        scales_at = address + stored_size
        block_rows, block_columns = tensor.block
        first_block, first_row = part.column // block_columns, part.row % block_rows
        blocks = -(-(part.column + part.columns) // block_columns) - first_block
        scale_rows = -(-(part.row + part.rows) // block_rows) - part.row // block_rows
        leading = tuple(map(sum, zip(box.offsets, part.leading, strict=False)))
        ones = (1,) * len(leading)
        # Of tensors with one dimension there is only one row, which no offset names.
        has_rows = box.dims > 1
        row, row_block = ((part.row,), (part.row // block_rows,)) if has_rows else ((), ())
        height, scale_height = ((part.rows,), (scale_rows,)) if has_rows else ((), ())
        if tensor.code == MXFP4:
            row_bytes = blocks * tensor.block_bytes
            offsets: tuple[int, ...] = (*leading, *row, first_block, 0)
            lengths: tuple[int, ...] = (*ones, *height, blocks, tensor.block_bytes)
        else:
            row_bytes = part.columns * box.itemsize
            offsets, lengths = (*leading, *row, part.column), (*ones, *height, part.columns)
        _add_read(items, self._records[tensor.stored], destination, offsets, lengths)
        _add_memory(destinations, address, tensor.stored.code, box.itemsize, lengths)
        offsets, lengths = (*leading, *row_block, first_block), (*ones, *scale_height, blocks)
        _add_read(items, self._records[tensor.scales], destination + 1, offsets, lengths)
        code = tensor.scales.code if tensor.has_exponents else _FLOAT32
        _add_memory(destinations, scales_at, code, box.scale_bytes, lengths)

        begin = (*part.leading, *((part.row - box.offsets[-2],) if has_rows else ()), part.column - box.offsets[-1])
        target_code = box.code
        if box.is_staged:
            lengths = (*ones, *height, part.columns)
            at, dtype = stored_size + scales_size, tensor.target_dtype
            staged = memory[at : at + part.rows * part.columns * dtype.itemsize].view(dtype).view(lengths)
            copies.append((narrow_tensor_by_index(box.target, begin, lengths), staged))
            to, itemsize, target_code = staged.data_ptr(), dtype.itemsize, box.target_code
            row_stride, column_stride = part.columns, 1
        else:
            strides, itemsize = box.target.stride(), box.target.dtype.itemsize
            to = box.target.data_ptr() + itemsize * sum(map(int.__mul__, begin, strides))
            row_stride, column_stride = (0, *strides)[-2:]
        rows.extend((tensor.code, tensor.has_exponents, box.target_code, target_code, part.rows, part.columns))
        rows.extend((address, row_bytes, scales_at, blocks, block_rows, block_columns, first_row))
        rows.extend((part.column % block_columns, to, row_stride * itemsize, column_stride * itemsize))


def _add_read(items: array[int], record: int, destination: int, offsets: Sequence[int], lengths: Sequence[int]) -> None:
    dims = len(lengths)
    items.extend((record, destination, dims, *offsets, *(0,) * dims, *lengths))


def _add_memory(destinations: array[int], address: int, code: int, itemsize: int, lengths: Sequence[int]) -> None:
    strides = [1]
    for length in lengths[:0:-1]:
        strides.append(strides[-1] * length)
    destinations.extend((address, HOST, code, itemsize, len(lengths), *lengths, *strides[::-1]))


def _batches(boxes: Sequence[_Box], capacity: int) -> Iterator[list[_Part]]:
    """Cut boxes into parts, and gather these into batches of at most ``capacity`` bytes, in order."""
    batch: list[_Part] = []
    used = 0
    for box in boxes:
        for part in box.parts(capacity):
            if used + part.size > capacity and batch:
                yield batch
                batch, used = [], 0
            batch.append(part)
            used += part.size
    if batch:
        yield batch


def _pieces(offset: int, length: int, block: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into pieces of at most ``most``, at edges of blocks where these are not larger than that."""
    end = offset + length
    if length <= most:
        yield offset, length
        return
    step = most // block * block or most
    while offset < end:
        stop = min(end, (offset // step + 1) * step if most >= block else offset + step)
        yield offset, stop - offset
        offset = stop


def _may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor may share memory, so that it matters which one is written last."""
    if tensor.layout is not torch.strided:
        return False
    least = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride < least:
            return True
        least = max(least, stride * size)
    return False


def _itemsize(code: int) -> int:
    dtype: torch.dtype = getattr(torch, _native.DTYPES[code])
    return dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
