"""What the calls of a pickle may copy, which may pass the same megabyte to any number of them, by a few bytes each."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["CopyBudget", "cost_of"]

# What a writer passes to a call is in the file once, with at least 2 bytes for an item of a set and 4 for a key and
# its value. So these many times the file are enough for all that is intact, at the costs below.
_LEAST = 64 << 20
_MOST_COPIES = 32
_MAPPINGS = (dict, collections.OrderedDict, collections.Counter, collections.defaultdict)
# Bytes of memory that an item takes, or may take in a copy.
_COSTS: dict[type, int] = {
    **dict.fromkeys((bytes, bytearray), 1),
    str: 4,
    **dict.fromkeys((list, tuple, torch.Size, collections.deque), 8),
    **dict.fromkeys((set, frozenset), 60),
    **dict.fromkeys(_MAPPINGS, 100),
}


def cost_of(values: Iterable[Any]) -> int:
    """Bytes that copies of all values take, without what is in them."""
    return sum(_COSTS[type(value)] * len(value) for value in values if type(value) in _COSTS)


class CopyBudget:
    """Bytes that copies may take.

    Args:
        size: bytes of the file or entry that the pickle is in.
    """

    def __init__(self, size: int) -> None:
        self._left = _LEAST + _MOST_COPIES * size

    def pays(self, cost: int) -> bool:
        """Take this from what is left. Whether there was as much."""
        self._left -= cost
        return self._left >= 0
