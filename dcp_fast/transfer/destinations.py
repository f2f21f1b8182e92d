"""Destinations: the tensors that a load writes into, as columns for the engine."""

from __future__ import annotations

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
# Of these types and dtypes a tensor on the host is plain if it is strided and not negated: see is_plain.
PLAIN_TENSORS = _native.PlainTensors(
    (torch.Tensor, torch.nn.Parameter),
    getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
    {dtype: (code, dtype.itemsize) for dtype, code in _CODES.items() if dtype in _REAL},
)

UNKNOWN = -1

# As they are in torch: an attribute of a tensor's own may hide them.
_data_ptr, _stride = torch.Tensor.data_ptr, torch.Tensor.stride

# Where elements lie, if not on a CUDA device: see csrc/transfer/program.h.
HOST = -1
ELSEWHERE = -2


class Destinations:
    """Tensors by index, each with a row for ``_native.Program``: address, device, dtype, bytes of an element,
    dimensions, sizes, strides.

    Sizes and strides are in elements.

    Attributes:
        tensors: all of them. They stay alive as long as this does.
        column: the rows, one after another.
        devices: ordinals of the CUDA devices that the engine writes to.
        all_have_addresses: whether it can be told which of the tensors share memory.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.devices: set[int] = set()
        self.column, self.all_have_addresses = PLAIN_TENSORS.rows(tensors, self._row)

    def _row(self, tensor: torch.Tensor) -> tuple[int, ...]:
        sizes = tensor.size()
        address = address_of(tensor)
        if not is_plain(tensor) or (address == 0 and tensor.numel() > 0):
            device = ELSEWHERE
        else:
            device = HOST if tensor.is_cpu else self._device(tensor)
        strides = _stride(tensor) if tensor.layout is _STRIDED else (0,) * len(sizes)
        dtype = tensor.dtype
        return (address, device, _CODES.get(dtype, UNKNOWN), dtype.itemsize, len(sizes), *sizes, *strides)

    def _device(self, tensor: torch.Tensor) -> int:
        device = served_device(tensor)
        if device is None:
            return ELSEWHERE
        self.devices.add(device)
        return device

    def anew(self) -> Destinations:
        """The same tensors, after a driver has refused what the engine needs to write to its device."""
        return Destinations(self.tensors)


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
        return _data_ptr(tensor)
    except (RuntimeError, NotImplementedError):
        return 0
