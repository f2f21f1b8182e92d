"""Windows of items for planners with hooks: resolved in order, placed together, committed in order.

torch resolves, places and commits each item before the next. A planner cannot tell the difference unless it goes by
what became of the items before. So a window ends where it could: see :class:`Windows`. What a planner keeps is watched
in planner_state.py.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from dcp_fast.planning.hooks import has_default_bytes, has_default_commit, has_default_resolve
from dcp_fast.planning.values import is_whole, plain_local_tensor
from dcp_fast.transfer.destinations import address_of
from dcp_fast.transfer.planner_state import PlannerState, counts_writes, hides_state, writes_to
from dcp_fast.transfer.value_watch import LookedError, ValueWatch

MOST_ITEMS = 4096
# So many items must have left the planner as it was before there is a window of more than one.
QUIET_ITEMS = 4
# A planner that changes at one of so many calls of resolve_tensor is as slow as one by one.
_CALM = 8

# Why items come one by one.
CHANGES = "its hooks change what it keeps, or the state dict"
_HIDES = "it keeps what nobody can watch, such as arrays, locks or objects with slots"
_LOOKS = "its resolve_tensor looks at values that are yet to come"
_NOT_COUNTED = "tensors of inference mode do not count writes"


Geometry = tuple[int, torch.Size, tuple[int, ...], torch.dtype, tuple[bool, bool]]


@dataclass(slots=True)
class Placement:
    """An item, the record that it is read from, and the tensor that is its box in the destination."""

    item: ReadItem
    record: int
    tensor: torch.Tensor


@dataclass(slots=True)
class _Entry:
    """A placement, and how the world was for it.

    Attributes:
        placement: of the item.
        value: in the state dict.
        geometry: of the tensor of the state dict that the item is a box of.
        writes: to the tensor, when it was placed.
    """

    placement: Placement
    value: Any
    geometry: Geometry | None
    writes: int = 0


@dataclass
class _Window:
    # In torch's order: tensors to be placed and committed, and calls that load bytes entries.
    entries: list[_Entry | Callable[[], None]] = field(default_factory=list)
    bytes: int = 0
    fqns: set[str] = field(default_factory=set)
    spans: list[tuple[int, int]] = field(default_factory=list)  # addresses of the tensors, sorted
    values: set[int] = field(default_factory=set)  # of the state dict, by identity
    memory: set[int] = field(default_factory=set)  # of the tensors


class Windows:
    """Calls the hooks of a planner so that their result equals that under torch's loader.

    Windows begin with one item, and grow as long as hooks leave the planner as it is (:class:`PlannerState`):

    - If a call of ``resolve_tensor`` changes it, that is put back until the items before are committed.
    - If it looks at values that are yet to come, or writes there (:class:`ValueWatch`), it is ended before it sees
      them, and called again when they have come. Items come one by one from then on.
    - If a call of ``commit_tensor`` changes it, or the state dict, what was resolved too early is resolved again, and
      items come one by one from then on; unless it puts back what ``resolve_tensor`` has changed for its item.
    - A tensor that an earlier commit wrote to is placed again.
    - A bytes entry ends a window, unless all hooks but ``commit_tensor`` are torch's, which do not look at values.
    - If a planner has a ``commit_tensor`` at all, no window has two boxes of one tensor, or tensors that share memory.

    Args:
        planner: the planner.
        resolve: finds the destination of an item and its record.
        place: brings the bytes of all placements into their tensors.
        most_bytes: how much the tensors of a window may hold: a planner may have allocated them for the load.
        one_by_one: why items must come one by one, if that is known already.
    """

    def __init__(
        self,
        planner: LoadPlanner,
        resolve: Callable[[ReadItem, int], Placement],
        place: Callable[[Sequence[Placement]], None],
        most_bytes: int,
        one_by_one: str = "",
    ) -> None:
        self._planner = planner
        self._resolve = resolve
        self._place = place
        self._most_bytes = most_bytes
        self._has_commit = not has_default_commit(planner)
        self._own_resolve = not has_default_resolve(planner)
        self._values_matter = self._own_resolve or not has_default_bytes(planner)
        self._state = PlannerState(planner)
        # As it was before a call of resolve_tensor changed it for an item, which is then a window of its own.
        self._before: PlannerState | None = None
        self._window = _Window()
        self._most = 1
        self._quiet = 0
        self._items = self._changes = 0
        self._one_by_one = one_by_one or (_HIDES if hides_state(planner) or self._state.is_hidden else "")

    @property
    def why_slow(self) -> str:
        """Why items came one by one; empty if most came in windows."""
        often = self._changes > QUIET_ITEMS and _CALM * self._changes > self._items
        why = self._one_by_one or (CHANGES if often else "")
        return f"items are read one by one, as {why}" if why else ""

    def add(self, item: ReadItem, record: int) -> None:
        """Resolve an item. Raises what that raises, with all before it in place and committed."""
        fqn = item.dest_index.fqn
        self._items += 1
        if self._has_commit and fqn in self._window.fqns:
            self.finish()
        try:
            placement = self._resolve_in_window(item, record)
        except Exception:
            change = self._state.take_back() if self._own_resolve and self._state.has_changed() else []
            self.finish()
            for again in change:
                again()
            raise
        if self._own_resolve and self._state.has_changed():
            if self._window.entries:
                change = self._state.take_back()
                if self.finish():  # it would have been called with what a commit has changed
                    placement = self._resolve(item, record)
                else:
                    for again in change:
                        again()
            self._before, self._state = self._state, PlannerState(self._planner)
            self._one_by_one = self._one_by_one or (_HIDES if self._state.is_hidden else "")
            self._most, self._quiet = 1, 0
            self._changes += 1
        tensor = placement.tensor
        size = tensor.numel() * tensor.element_size()
        if self._has_commit:
            span = _span(tensor, size)
            if _meets(self._window.spans, span):
                self.finish()
            insort(self._window.spans, span)
        window = self._window
        window.fqns.add(fqn)
        window.bytes += size
        value = self._value_of(fqn)
        if self._own_resolve:
            window.values.add(id(value))
            with suppress(Exception):  # of a tensor without memory, which is taken for pending anyway
                window.memory.add(_memory_of(tensor))
        if not (counts_writes(tensor) and counts_writes(value)):
            self._one_by_one, self._most = self._one_by_one or _NOT_COUNTED, 1
        self._add(_Entry(placement, value, self._geometry_of(item, value)))

    def _resolve_in_window(self, item: ReadItem, record: int) -> Placement:
        if not (self._own_resolve and self._window.entries):
            return self._resolve(item, record)
        watch = ValueWatch(self._is_pending)
        try:
            with watch:
                placement = self._resolve(item, record)
        except LookedError:
            pass
        except Exception:
            if not watch.has_looked:
                raise
        if watch.has_looked:
            # It is called anew when all before it is committed, and so are those that come later.
            self._state.take_back()
            self._one_by_one, self._most = self._one_by_one or _LOOKS, 1
            self.finish()
            placement = self._resolve(item, record)
        return placement

    def _is_pending(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor are yet to come; so it seems if nobody can tell."""
        window = self._window
        try:
            return id(tensor) in window.values or _memory_of(tensor) in window.memory
        except Exception:  # of tensors that have no memory of their own
            return True

    def add_bytes(self, load: Callable[[], None]) -> None:
        """A bytes entry, which is loaded when all before it is committed."""
        self._add(load)
        if self._values_matter:
            self.finish()

    def finish(self) -> bool:
        """Place and commit what the window has. Returns whether that changed what the planner keeps."""
        window, self._window = self._window, _Window()
        entries = [entry for entry in window.entries if isinstance(entry, _Entry)]
        again = is_changed = False  # whether what follows is resolved and placed again, one by one
        try:
            self._place_all(entries)
        except Exception:
            if len(window.entries) == 1:
                raise
            again = True  # so that all before the one that fails is committed
        planner, value_of = self._planner, self._value_of
        for entry in window.entries:
            if isinstance(entry, _Entry):
                placement = entry.placement
                value = value_of(placement.item.dest_index.fqn)
                if again or value is not entry.value or self._geometry_of(placement.item, value) != entry.geometry:
                    entry.placement = placement = self._resolve(placement.item, placement.record)
                    self._place_all([entry])
                elif writes_to(placement.tensor, value) != entry.writes:
                    self._place_all([entry])
                if self._has_commit:
                    planner.commit_tensor(placement.item, placement.tensor)
            else:
                entry()
            if not self._state.has_changed():
                continue
            if self._before is not None and not self._before.has_changed():
                self._state, self._before = self._before, None
            else:
                self._state.keep()
                self._one_by_one, self._most, again, is_changed = self._one_by_one or CHANGES, 1, True, True
        if window.entries:
            self._before = None  # items to come are resolved as the planner is now
        return is_changed

    def _place_all(self, entries: Sequence[_Entry]) -> None:
        if not entries:
            return
        self._place([entry.placement for entry in entries])
        for entry in entries:
            entry.writes = writes_to(entry.placement.tensor, entry.value)
        for state in (self._state, self._before):
            if state is not None:
                state.keep_versions()

    def _value_of(self, fqn: str) -> Any:
        values = getattr(self._planner, "state_dict", None)
        return values.get(fqn) if isinstance(values, dict) else None

    def _geometry_of(self, item: ReadItem, value: Any) -> Geometry | None:
        tensor = tensor_in(self._planner.state_dict, item, value) if value is not None else None  # type: ignore[attr-defined]
        return None if tensor is None else geometry_of(tensor)

    def _add(self, entry: _Entry | Callable[[], None]) -> None:
        window = self._window
        window.entries.append(entry)
        self._quiet += 1
        if len(window.entries) >= self._most or window.bytes >= self._most_bytes:
            self.finish()
            if not self._one_by_one and self._quiet >= QUIET_ITEMS:
                self._most = min(2 * self._most, MOST_ITEMS)


def _memory_of(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor from that of others. Raises whatever a tensor without one raises."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage().data_ptr()


def tensor_in(state_dict: dict[str, Any], item: ReadItem, value: Any) -> torch.Tensor | None:
    """The tensor that an item is a box of, which a value of the state dict is or has; None if there is none."""
    tensor = value if is_whole(value) else plain_local_tensor(value)
    if tensor is None and isinstance(value, torch.Tensor):
        with suppress(Exception):  # of torch: then there is none any more
            tensor = find_state_dict_object(state_dict, item.dest_index)
    return tensor


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """Where a tensor's elements are, and what its memory means. A hook may change all of that."""
    dtype = tensor.dtype
    bits = (tensor.is_neg(), dtype.is_complex and tensor.is_conj())
    return address_of(tensor), tensor.size(), tensor.stride() if tensor.layout is torch.strided else (), dtype, bits


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
