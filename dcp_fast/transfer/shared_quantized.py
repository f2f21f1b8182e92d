"""Boxes of quantized tensors that ranks share: they are dequantized as their elements arrive from other ranks.

The scales come first. All of this rank's are in memory then, so that elements can be dequantized in whatever pieces
rounds bring them.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import mul

import torch

from dcp_fast import _native
from dcp_fast.transfer.batches import ALIGNMENT
from dcp_fast.transfer.destinations import HOST
from dcp_fast.transfer.quantized_parts import CutBox, QuantizedBox, may_overlap
from dcp_fast.transfer.quantized_tensors import MXFP4, StoredTensor
from dcp_fast.transfer.staging_memory import allocate

_MOST_UNIT_BYTES = 16  # of a block of MXFP4 that an exchange does not cut


class SharedBoxes:
    """Boxes that can be shared, and what an exchange is told of them.

    Args:
        boxes: all of them.
        records: the number of each stored tensor in the layouts.
        most_bytes: memory for scales.

    Attributes:
        boxes: those that are shared so.
        others: those that are not dequantized here, and those whose scales do not fit into memory.
        bytes_needed: of elements.
    """

    def __init__(self, boxes: Sequence[QuantizedBox], records: Mapping[StoredTensor, int], most_bytes: int) -> None:
        self._records = records
        self.boxes: list[QuantizedBox] = []
        self.others: list[QuantizedBox] = []
        self._boxes: list[CutBox] = []
        self._starts: list[int] = []
        self._scale_bytes = 0
        self.bytes_needed = 0
        for box in boxes:
            box.check()
            cut = CutBox(box)
            if 0 in cut.lengths:
                continue
            size = -(-prod(_scales_of(cut)[1]) * cut.scale_bytes // ALIGNMENT) * ALIGNMENT
            if not _can_share(cut) or self._scale_bytes + size > most_bytes:
                self.others.append(box)
                continue
            self.boxes.append(box)
            self._boxes.append(cut)
            self._starts.append(self._scale_bytes)
            self._scale_bytes += size

    def __len__(self) -> int:
        return len(self._boxes)

    def allocate(self) -> None:
        """Have memory for the scales. Raises MemoryError."""
        self._scales = allocate(self._scale_bytes, torch.device("cpu"))

    def scales(self, layouts: _native.Layouts) -> _native.Program:
        """The program that brings the scales to their memory."""
        items, destinations = array("q"), array("q")
        for number, (box, start) in enumerate(zip(self._boxes, self._starts, strict=True)):
            offsets, lengths = _scales_of(box)
            dims = len(lengths)
            items.extend((self._records[box.tensor.scales], number, dims, *offsets, *(0,) * dims, *lengths))
            strides = [*accumulate(lengths[:0:-1], mul, initial=1)][::-1]
            address = self._scales.data_ptr() + start
            destinations.extend((address, HOST, box.scale_code, box.scale_bytes, dims, *lengths, *strides))
        program = _native.Program(layouts, items, destinations)
        # What was left out would be multiplied with what nobody read.
        assert not program.converted(0)
        assert not program.fallback(0)
        return program

    def elements(self) -> array[int]:
        """Rows for ``_native.Need.of_quantized``."""
        rows = array("q")
        for box, start in zip(self._boxes, self._starts, strict=True):
            self._add(box, self._scales.data_ptr() + start, rows)
        return rows

    def _add(self, box: CutBox, scales: int, rows: array[int]) -> None:
        tensor, target = box.tensor, box.target
        block_rows, block_columns = tensor.block
        height, width = (1, *box.lengths)[-2:]
        row, column = (0, *box.offsets)[-2:]
        all_rows, all_columns = (1, *tensor.sizes)[-2:]
        _, of_scales = _scales_of(box)
        down, across = (1, *of_scales)[-2:]
        if tensor.code == MXFP4:
            unit_bytes, unit_columns, units = tensor.block_bytes, block_columns, across
        else:
            unit_bytes, unit_columns, units = box.itemsize, 1, width
        stored_row_bytes = all_columns // unit_columns * unit_bytes
        row_bytes = units * unit_bytes
        itemsize, strides = target.dtype.itemsize, (0, *target.stride())
        leading_sizes = tensor.sizes[:-2]
        for number, leading in enumerate(itertools.product(*map(range, box.lengths[:-2]))):
            matrix = 0
            for size, offset, index in zip(leading_sizes, box.offsets, leading, strict=False):
                matrix = matrix * size + offset + index
            begin = (matrix * all_rows + row) * stored_row_bytes + column // unit_columns * unit_bytes
            to = target.data_ptr() + itemsize * sum(map(mul, leading, target.stride()))
            rows.extend((self._records[tensor.stored], begin, stored_row_bytes, row_bytes, unit_bytes, unit_columns))
            rows.extend((box.code, tensor.has_exponents, box.target_code, box.result_code, height, width, 0, 0))
            rows.extend((scales + number * down * across * box.scale_bytes, across, block_rows, block_columns))
            rows.extend((row % block_rows, column % block_columns, to, itemsize * strides[-2], itemsize * strides[-1]))
            self.bytes_needed += height * row_bytes


def _can_share(box: CutBox) -> bool:
    """Whether a box goes straight from what other ranks send to its target, whatever pieces it comes in."""
    unit = box.tensor.block_bytes if box.tensor.code == MXFP4 else box.itemsize
    return box.device is None and not box.is_staged and not may_overlap(box.target) and unit <= _MOST_UNIT_BYTES


def _scales_of(box: CutBox) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and lengths, among the scales, of those of the blocks that a box has elements of."""
    blocks = (1,) * (box.dims - 2) + box.tensor.block[-min(box.dims, 2) :]
    offsets = tuple(offset // block for offset, block in zip(box.offsets, blocks, strict=True))
    ends = (-(-(at + size) // block) for at, size, block in zip(box.offsets, box.lengths, blocks, strict=True))
    return offsets, tuple(end - begin for begin, end in zip(offsets, ends, strict=True))
