"""Notices when a hook of a planner looks at tensors whose values are yet to come, or writes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import EllipsisType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_Tensor = torch.Tensor
# What makes a tensor, a view, or an answer that does not depend on values. All else is taken for a look at them.
_METHODS = (
    *("detach", "narrow", "select", "view", "view_as", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand"),
    *("chunk", "split", "unbind", "size", "dim", "stride", "storage_offset", "numel", "nelement", "data_ptr"),
    *("element_size", "is_contiguous", "is_floating_point", "is_complex", "is_inference", "__len__", "__hash__"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "requires_grad_"),
)
_FUNCTIONS = (
    *("narrow", "select", "transpose", "permute", "numel", "is_floating_point", "is_complex", "is_tensor"),
    *("empty", "zeros", "ones", "full", "empty_strided", "empty_like", "zeros_like", "ones_like", "full_like"),
)
_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "data", "is_leaf", "_version"),
    *("_base", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "nbytes"),
    *("itemsize", "T", "mT", "retains_grad", "output_nr"),
)
# Another torch may lack some.
_INERT = {
    *(getattr(_Tensor, name) for name in _METHODS if hasattr(_Tensor, name)),
    *(getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)),
    *(getattr(_Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(_Tensor, name)),
}


class ValueWatch(TorchFunctionMode):
    """While a hook runs: has values come before it looks at them.

    Args:
        is_pending: whether a tensor is one, or shares memory with one, whose values are yet to come.
        have_come: has all values come.
    """

    def __init__(self, is_pending: Callable[[torch.Tensor], bool], have_come: Callable[[], None]) -> None:
        super().__init__()
        self._is_pending = is_pending
        self._have_come = have_come

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_inert(func, args) and any(map(self._is_pending, _tensors_in((*args, *kwargs.values())))):
            self._have_come()
        return func(*args, **kwargs)


def _is_inert(func: Any, args: tuple[Any, ...]) -> bool:
    if func in _INERT:
        return True
    if func is not _Tensor.__getitem__ or len(args) != 2:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(part is None or isinstance(part, int | slice | EllipsisType) for part in index)


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
