"""Helpers of steps that all ranks take together: a result or error that is kept for later, and an all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch
import torch.distributed as dist

from dcp_fast._torch import DistWrapper, get_object_coll_device

T = TypeVar("T")


class Outcome(Generic[T]):
    """Calls a function, and keeps what it returns or raises."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self._value: T | None = None
        try:
            self._value = function()
        except BaseException as error:
            self.error = error

    @property
    def value(self) -> T:
        """What it returned; None if there is an error."""
        return cast(T, self._value)

    def get(self) -> T:
        """What it returned. Raises what it raised."""
        if self.error is not None:
            raise self.error
        return self.value


def collective_device(ranks: DistWrapper) -> torch.device:
    """Where the backend of the ranks' group wants tensors to be."""
    device = torch.device(get_object_coll_device(ranks.group))
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def largest(ranks: DistWrapper, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> list[int]:
    """For each number the largest that any rank has. Collective: an all-reduce by maximum, which all backends have."""
    tensor = torch.tensor(numbers, dtype=dtype, device=collective_device(ranks))
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=ranks.group)
    return cast(list[int], tensor.tolist())
