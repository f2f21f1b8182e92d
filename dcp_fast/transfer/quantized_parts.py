"""Boxes of quantized tensors, cut into parts along the edges of blocks, so that each part fits into a buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dcp_fast import _native
from dcp_fast.errors import SizeMismatchError
from dcp_fast.transfer.batches import ALIGNMENT
from dcp_fast.transfer.destinations import DTYPES, is_plain
from dcp_fast.transfer.devices import served_device
from dcp_fast.transfer.quantized_tensors import CODES, MXFP4, QuantizedTensor, code_of

_FLOAT32 = CODES["float32"]
_WIDE = torch.float32.itemsize


@dataclass
class QuantizedBox:
    """A box on its way from a quantized tensor to a target.

    ``offsets`` and ``lengths`` are those of the box in the dequantized tensor.
    """

    tensor: QuantizedTensor
    offsets: Sequence[int]
    lengths: Sequence[int]
    target: torch.Tensor

    def check(self) -> None:
        """Raise SizeMismatchError where the box does not lie in the tensor, or the target has other sizes."""
        sizes, lengths = self.tensor.sizes, self.lengths
        if len(sizes) != len(lengths) or any(
            offset < 0 or offset + length > size
            for offset, length, size in zip(self.offsets, lengths, sizes, strict=False)
        ):
            reason = (
                f"the box at {list(self.offsets)} of lengths {list(lengths)} exceeds the dequantized tensor of sizes "
                f"{list(sizes)}"
            )
            raise self.tensor.stored.error(SizeMismatchError, reason)
        if list(self.target.size()) != list(lengths):  # as hooks may resolve it
            reason = f"the target of sizes {list(self.target.size())} is for a box of lengths {list(lengths)}"
            raise self.tensor.stored.error(SizeMismatchError, reason)


class Areas(NamedTuple):
    """Bytes of a buffer for a part, one area behind another.

    Attributes:
        elements, scales: as they are read.
        wide_elements, wide_scales: as float32, which torch makes of those whose dtype a device's kernel does not know.
        staged: results that torch brings to the target.
    """

    elements: int
    scales: int
    wide_elements: int
    wide_scales: int
    staged: int


class Part(NamedTuple):
    """A part of a box, in its last two dimensions: rows and columns of the dequantized tensor.

    Attributes:
        leading: where it lies in the dimensions before those, from where the box begins.
        row, rows, column, columns: where it begins, from where the tensor begins, and how many it has.
        size: what it takes of a buffer, in bytes.
    """

    box: CutBox
    leading: tuple[int, ...]
    row: int
    rows: int
    column: int
    columns: int
    size: int


class CutBox:
    """A box, and how its parts are read, dequantized and placed.

    Attributes:
        device: the CUDA device whose kernel dequantizes it, as an ordinal; None: the host does.
        code: dtype of the elements that are dequantized, or MXFP4.
        scale_code: dtype that scales are read as.
        widens_elements, widens_scales: whether torch makes float32 of them before.
        is_staged: whether torch brings the results to the target.
        result_code: dtype of the results.
    """

    def __init__(self, box: QuantizedBox) -> None:
        self.tensor = tensor = box.tensor
        self.target = box.target
        self.dims = len(tensor.sizes)
        self.offsets = tuple(box.offsets)
        self.lengths = tuple(box.target.size())
        self.device = served_device(box.target)
        self.code = tensor.code
        target_code, wanted = code_of(tensor.target_dtype), code_of(box.target.dtype)
        if self.device is None:
            self.widens_elements = self.widens_scales = False
            self.scale_code = tensor.scales.code if tensor.has_exponents else _FLOAT32
            places = box.target.is_cpu and _native.can_dequantize(self.code, tensor.has_exponents, target_code, wanted)
        else:
            self.widens_elements = not _native.can_dequantize_on_device(self.code, _FLOAT32, _FLOAT32)
            self.scale_code = tensor.scales.code
            self.widens_scales = not tensor.has_exponents and self.scale_code != _FLOAT32
            places = _native.can_dequantize_on_device(_FLOAT32, target_code, wanted) and not may_overlap(box.target)
            if self.widens_elements:
                self.code = _FLOAT32
        self.is_staged = not (places and is_plain(box.target))
        self.target_code = target_code
        self.result_code = target_code if self.is_staged else wanted
        self.itemsize = 1 if tensor.code == MXFP4 else itemsize_of(tensor.code)
        self.scale_bytes = itemsize_of(self.scale_code)

    def areas(self, rows: int, columns: int) -> Areas:
        """What a part of so many rows and columns takes of a buffer, at the most."""
        block_rows, block_columns = self.tensor.block
        across = columns // block_columns + 2
        scales = (rows if block_rows == 1 else rows // block_rows + 2) * across
        elements = rows * (across * self.tensor.block_bytes if self.tensor.code == MXFP4 else columns)
        return Areas(
            _aligned(elements * self.itemsize),
            _aligned(scales * self.scale_bytes),
            _aligned(elements * _WIDE) if self.widens_elements else 0,
            _aligned(scales * _WIDE) if self.widens_scales else 0,
            _aligned(rows * columns * self.tensor.target_dtype.itemsize) if self.is_staged else 0,
        )

    def most_bytes(self) -> int:
        """What the box takes of a buffer if its last two dimensions are not cut, at the most."""
        if 0 in self.lengths:
            return 0
        matrices = 1
        for length in self.lengths[:-2]:
            matrices *= length
        return matrices * sum(self.areas(*(1, *self.lengths)[-2:]))

    def parts(self, capacity: int) -> Iterator[Part]:
        """Cut the box into parts, each of which a buffer of so many bytes has room for."""
        if 0 in self.lengths:
            return
        rows, columns = (1, *self.lengths)[-2:]
        row, column = (0, *self.offsets)[-2:]
        block_rows, block_columns = self.tensor.block

        def fits(down: int, across: int) -> bool:
            return sum(self.areas(down, across)) <= capacity

        across = columns
        down = _most(rows, lambda number: fits(number, across))
        if down < min(block_rows, rows) or not fits(down, across):
            down = min(block_rows, rows)
            across = _most(columns, lambda number: fits(down, number))
            if across < min(block_columns, columns) or not fits(down, across):
                across = min(block_columns, _most(columns, lambda number: fits(1, number)))
                down = _most(down, lambda number: fits(number, across))
        for leading in itertools.product(*map(range, self.lengths[:-2])):
            for at, height in _pieces(row, rows, block_rows, down):
                for start, width in _pieces(column, columns, block_columns, across):
                    yield Part(self, leading, at, height, start, width, sum(self.areas(height, width)))


def batches_of_parts(boxes: Sequence[CutBox], capacity: int) -> Iterator[list[Part]]:
    """Cut boxes into parts, and gather these into batches of at most ``capacity`` bytes, in order."""
    batch: list[Part] = []
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


def may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor may share memory, so that it matters which one is written last."""
    if tensor.layout is not torch.strided:
        return False
    least = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride < least:
            return True
        least = max(least, stride * size)
    return False


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to a limit that fits, and 1 at least."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


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


def itemsize_of(code: int) -> int:
    """Bytes of an element, by the code of its dtype."""
    dtype = DTYPES[code]
    assert dtype is not None
    return dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
