"""Windows of items for planners with hooks: resolved in order, placed together, committed in order.

torch resolves, places and commits each item before the next. A planner cannot tell the difference unless it goes by
what became of the items before. So a window ends where it could: see :class:`Windows`.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from dcp_fast.planning.hooks import has_default_commit
from dcp_fast.transfer.destinations import address_of

__all__ = ["Placement", "Windows"]

_MOST_ITEMS = 4096
# So many items must have left the planner as it was before there is a window of more than one.
_QUIET_ITEMS = 4


@dataclass(slots=True)
class Placement:
    """An item, the record that it is read from, and the tensor that is its box in the destination."""

    item: ReadItem
    record: int
    tensor: torch.Tensor


@dataclass
class _Window:
    # In torch's order: tensors to be placed and committed, and calls that load bytes entries.
    entries: list[Placement | Callable[[], None]] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    bytes: int = 0
    fqns: set[str] = field(default_factory=set)
    spans: list[tuple[int, int]] = field(default_factory=list)  # addresses of the tensors, sorted


class Windows:
    """Calls the hooks of a planner so that their result equals that under torch's loader.

    Windows begin with one item, and grow as long as the planner keeps nothing of the calls: it sets no attribute anew,
    and no container among its attributes grows or shrinks. Where a call of ``resolve_tensor`` does that, the
    attributes are put back to what they were until the items before are committed. A planner whose ``commit_tensor``
    does that gets one item after the other from then on. If a planner has a ``commit_tensor`` at all, no window has
    two boxes of one tensor, or tensors that share memory.

    Args:
        planner: the planner.
        resolve: finds the destination of an item and its record.
        place: brings the bytes of all placements into their tensors.
        most_bytes: how much the tensors of a window may hold: a planner may have allocated them for the load.
    """

    def __init__(
        self,
        planner: LoadPlanner,
        resolve: Callable[[ReadItem, int], Placement],
        place: Callable[[Sequence[Placement]], None],
        most_bytes: int,
    ) -> None:
        self._planner = planner
        self._resolve = resolve
        self._place = place
        self._most_bytes = most_bytes
        self._has_commit = not has_default_commit(planner)
        self._state = _State(planner)
        self._window = _Window()
        self._most = 1
        self._quiet = 0
        # Where attributes have slots, nobody notices what becomes of them.
        self._one_by_one = any(vars(cls).get("__slots__") for cls in type(planner).__mro__)

    def add(self, item: ReadItem, record: int) -> None:
        """Resolve an item. Raises what that raises, with all before it in place and committed."""
        fqn = item.dest_index.fqn
        if self._has_commit and fqn in self._window.fqns:
            self.finish()
        try:
            placement = self._resolve(item, record)
        except Exception:
            self.finish()
            raise
        if self._state.has_changed():
            change = self._state.take_back()
            self.finish()
            self._state.apply(change)
            self._most, self._quiet = 1, 0
        tensor = placement.tensor
        size = tensor.numel() * tensor.element_size()
        if self._has_commit:
            span = _span(tensor, size)
            if _meets(self._window.spans, span):
                self.finish()
            insort(self._window.spans, span)
        window = self._window
        window.placements.append(placement)
        window.fqns.add(fqn)
        window.bytes += size
        self._add(placement)

    def add_bytes(self, load: Callable[[], None]) -> None:
        """A bytes entry, which is loaded when all before it is committed."""
        self._add(load)

    def finish(self) -> None:
        """Place and commit what the window has."""
        window, self._window = self._window, _Window()
        one_by_one = False
        try:
            if window.placements:
                self._place(window.placements)
        except Exception:
            if len(window.entries) == 1:
                raise
            one_by_one = True  # so that all before the one that fails is committed
        for entry in window.entries:
            if not isinstance(entry, Placement):
                entry()
            else:
                if one_by_one:
                    self._place([entry])
                if self._has_commit:
                    self._planner.commit_tensor(entry.item, entry.tensor)
            if self._state.has_changed():
                self._state.keep()
                self._one_by_one, self._most = True, 1

    def _add(self, entry: Placement | Callable[[], None]) -> None:
        window = self._window
        window.entries.append(entry)
        self._quiet += 1
        if len(window.entries) >= self._most or window.bytes >= self._most_bytes:
            self.finish()
            if not self._one_by_one and self._quiet >= _QUIET_ITEMS:
                self._most = min(2 * self._most, _MOST_ITEMS)


class _State:
    """What a planner holds: its attributes, and how long those are that have a length."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._now: dict[str, Any] = getattr(planner, "__dict__", {})
        self.keep()

    def keep(self) -> None:
        """Changes are told from here on."""
        self._before = dict(self._now)
        self._names, self._values = list(self._before), list(self._before.values())
        # A tensor of no dimensions has no length.
        self._containers = [v for v in self._values if isinstance(v, Sized) and not isinstance(v, torch.Tensor)]
        self._lengths = list(map(len, self._containers))

    def has_changed(self) -> bool:
        # Asked after each call of a hook, so that it may take no longer than the call.
        now = self._now
        return not (
            list(now) == self._names
            and all(map(is_, now.values(), self._values))
            and list(map(len, self._containers)) == self._lengths
        )

    def take_back(self) -> dict[str, Any]:
        """Put back the attributes. Returns those that were set anew; what a container has got stays there."""
        change = {name: value for name, value in self._now.items() if self._before.get(name, self) is not value}
        self._now.clear()
        self._now.update(self._before)
        self.keep()
        return change

    def apply(self, change: dict[str, Any]) -> None:
        self._now.update(change)
        self.keep()


def _span(tensor: torch.Tensor, size: int) -> tuple[int, int]:
    """The addresses of a tensor's elements, which have ``size`` bytes; all there are if nobody can tell."""
    begin = address_of(tensor)
    if size == 0:
        return begin, begin
    if begin == 0:
        return 0, sys.maxsize
    if tensor.is_contiguous():
        return begin, begin + size
    elements = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True)) + 1
    return begin, begin + elements * tensor.element_size()


def _meets(spans: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    at = bisect_left(spans, span)
    after = spans[at] if at < len(spans) else None
    before = spans[at - 1] if at > 0 else None
    return (after is not None and after[0] < span[1]) or (before is not None and before[1] > span[0])
