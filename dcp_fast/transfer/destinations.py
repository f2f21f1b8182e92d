"""Destinations: the tensors that a load writes into, as columns for the engine."""

from __future__ import annotations

from array import array
from functools import cache

import torch

from dcp_fast import _native
from dcp_fast._torch import disabled_torch_function
from dcp_fast.transfer.devices import served_device

# Native dtype codes by torch.dtype, and back. A name that this torch does not have never matches a tensor of it.
DTYPES: list[torch.dtype | None] = [getattr(torch, name, None) for name in _native.DTYPES]
_CODES: dict[torch.dtype, int] = {dtype: code for code, dtype in enumerate(DTYPES) if dtype is not None}
_STRIDED = torch.strided
_REAL = frozenset(dtype for dtype in _CODES if not dtype.is_complex)

_UNKNOWN = -1

# Where elements lie, if not on a CUDA device: see csrc/transfer/program.h.
HOST = -1
_ELSEWHERE = -2


class Destinations:
    """Tensors by index, each with a row for ``_native.Program``: address, device, dtype, bytes of an element,
    dimensions, sizes, strides.

    Sizes and strides are in elements.

    Attributes:
        tensors: what was added. They stay alive as long as this does.
        devices: ordinals of the CUDA devices that the engine writes to.
        all_have_addresses: whether it can be told which of the tensors share memory.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.devices: set[int] = set()
        self.all_have_addresses = True
        self._column: list[int] = []

    def add(self, tensor: torch.Tensor) -> int:
        """Add a tensor, and return its index."""
        # A load may have tens of thousands of tensors, and to ask one for anything takes time.
        sizes = tensor.size()
        if is_plain(tensor):
            address, strides = tensor.data_ptr(), tensor.stride()
            device = HOST if tensor.is_cpu else self._device(tensor)
        else:
            address, device = address_of(tensor), _ELSEWHERE
            strides = tensor.stride() if tensor.layout is _STRIDED else (0,) * len(sizes)
        if address == 0 and tensor.numel() > 0:
            self.all_have_addresses = False
        dtype = tensor.dtype
        self._column += (address, device, _CODES.get(dtype, _UNKNOWN), dtype.itemsize, len(sizes), *sizes, *strides)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _device(self, tensor: torch.Tensor) -> int:
        device = served_device(tensor)
        if device is None:
            return _ELSEWHERE
        self.devices.add(device)
        return device

    def anew(self) -> Destinations:
        """The same tensors, after a driver has refused what the engine needs to write to its device."""
        result = Destinations()
        for tensor in self.tensors:
            result.add(tensor)
        return result

    def column(self) -> array[int]:
        """The rows, one after another."""
        return array("q", self._column)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether memory holds the elements of a tensor as they are.

    Not so if a subclass gives them another meaning, or if they are quantized, or conjugated or negated lazily.
    """
    return (
        _is_plain_type(type(tensor))
        and tensor.layout is _STRIDED
        and not tensor.is_neg()
        and (tensor.dtype in _REAL or not (tensor.is_quantized or tensor.is_conj()))
    )


@cache
def _is_plain_type(cls: type) -> bool:
    # A subclass that overrides neither of these two cannot tell whether copy_ or the engine writes to its memory.
    functions = (cls.__torch_function__, torch.Tensor.__torch_function__)  # type: ignore[attr-defined]
    default_function = getattr(functions[0], "__func__", functions[0]) in (
        getattr(functions[1], "__func__", functions[1]),
        disabled_torch_function,
    )
    default_dispatch = cls.__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    return default_function and default_dispatch


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins, to notice destinations that share memory; 0 if it has none of its own."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
