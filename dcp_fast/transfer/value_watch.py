"""Notices when a hook of a planner looks at tensors whose values are yet to come, or writes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import EllipsisType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_Tensor = torch.Tensor
# What makes a view, or gives an answer that does not depend on values. All else is taken for a look at them.
_METHODS = (
    *("detach", "narrow", "select", "view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "chunk"),
    *("split", "unbind", "size", "dim", "stride", "storage_offset", "numel", "nelement", "data_ptr", "get_device"),
    *("element_size", "is_contiguous", "is_floating_point", "is_complex", "is_inference", "__len__", "__hash__"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "requires_grad_"),
)
_FUNCTIONS = (
    *("narrow", "select", "transpose", "permute", "numel", "is_floating_point", "is_complex", "is_tensor"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
# What makes a tensor of no other one.
_MAKERS = ("empty", "zeros", "ones", "full", "empty_strided")
_ATTRIBUTES = (
    *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "data", "is_leaf", "_version"),
    *("_base", "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "nbytes"),
    *("itemsize", "T", "mT", "retains_grad", "output_nr"),
)
# To how many of the arguments are tensors that are not looked at. Another torch may lack some functions.
_INERT = {
    **{getattr(_Tensor, name): 1 for name in _METHODS if hasattr(_Tensor, name)},
    **{getattr(torch, name): 1 for name in _FUNCTIONS if hasattr(torch, name)},
    **{getattr(torch, name): 0 for name in _MAKERS if hasattr(torch, name)},
    **{getattr(_Tensor, name).__get__: 1 for name in _ATTRIBUTES if hasattr(_Tensor, name)},
}


class LookedError(BaseException):
    """Ends a hook that looks at values which are yet to come, before it sees them."""


class ValueWatch(TorchFunctionMode):
    """Watches what a hook does.

    Args:
        is_pending: whether a tensor is one, or shares memory with one, whose values are yet to come.

    Attributes:
        has_looked: whether the hook looked at such a tensor, whatever it made of LookedError.
    """

    def __init__(self, is_pending: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._is_pending = is_pending
        self.has_looked = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(self._is_pending, _looked_at(func, args, kwargs))):
            self.has_looked = True
            raise LookedError
        return func(*args, **kwargs)


def _looked_at(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors whose values a call may look at or change."""
    inert = _INERT.get(func, 0)
    if func is _Tensor.__getitem__ and len(args) == 2:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        inert = 2 if all(map(_is_plain, index)) else 0
    return _tensors_in((*args[inert:], *kwargs.values()))


def _is_plain(index: Any) -> bool:
    """Whether a part of an index leads to a view, whatever the values of tensors."""
    if isinstance(index, slice):
        return all(part is None or type(part) is int for part in (index.start, index.stop, index.step))
    return index is None or type(index) is int or isinstance(index, EllipsisType)


def _tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
