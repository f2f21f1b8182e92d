"""Quantized tensors, and where their elements and scales lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dcp_fast import _native
from dcp_fast.errors import LoadError

CODES = {name: code for code, name in enumerate(_native.DTYPES)}
MXFP4 = -1  # in place of the code of a dtype


class StoredTensor(NamedTuple):
    """A tensor as a file has it.

    Attributes:
        offset, length: in bytes.
        code: of its dtype, as the engine names it.
        is_whole: whether it is the only chunk of that name.
    """

    fqn: str
    path: str
    offset: int
    length: int
    code: int
    sizes: tuple[int, ...]
    is_whole: bool

    def error(self, cls: type[LoadError], reason: str) -> LoadError:
        return cls(reason, self.path, self.fqn, self.offset, self.length)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor whose stored elements are dequantized while they are read.

    Attributes:
        stored: its elements: in their own dtype, or in blocks of MXFP4.
        scales: of its blocks.
        sizes: of the dequantized tensor.
        block: rows and columns of a block, in its last two dimensions.
        code: dtype of the elements, or MXFP4.
        has_exponents: whether a scale is the exponent of a power of two (E8M0), and no number.
        target_dtype: of what the elements become, before they are converted to the dtype of their destination.
    """

    stored: StoredTensor
    scales: StoredTensor
    sizes: tuple[int, ...]
    block: tuple[int, int]
    code: int
    has_exponents: bool
    target_dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of MXFP4."""
        return self.stored.sizes[-1]


def code_of(dtype: torch.dtype) -> int:
    """The code of a dtype; -1 if the engine does not know it."""
    return CODES.get(str(dtype).removeprefix("torch."), -1)
