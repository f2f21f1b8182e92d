"""Windows of items for planners of which no hook but ``commit_tensor`` is their own.

Their destinations are those of the state dict, so that one native program has all items, and each window is a wave of
it. What such a planner does in its hook may make that wrong: then the rest is for windows.py, which asks it item by
item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.planning.values import TENSOR_TYPES, plain_local_tensor
from dcp_fast.transfer.destinations import PLAIN_TENSORS
from dcp_fast.transfer.items import Resolved
from dcp_fast.transfer.planner_state import PlannerState
from dcp_fast.transfer.windows import CHANGES, MOST_ITEMS, QUIET_ITEMS, geometry_of, tensor_in

# By how much windows grow. Each ends with threads that wait for the last one; a planner that is found to be in the way
# has what was left of its window read twice.
_GROWTH = 8


@dataclass
class Done:
    """How far a load came.

    Attributes:
        items: how many items are in place and committed, of those in torch's order.
        is_all: whether these are all.
        one_by_one: why each of the others may depend on the ones before it; empty if none does.
    """

    items: int
    is_all: bool = False
    one_by_one: str = ""


def windows_of(order: Iterable[int], fqns: Sequence[str]) -> list[list[int]]:
    """Cut the items of a load into windows that have one box of each tensor. They begin with one item, and grow.

    Args:
        order: the items, as :meth:`Items.order` has them.
        fqns: of the tensors.
    """
    windows: list[list[int]] = []
    window: list[int] = []
    seen: set[str] = set()
    most = 1
    for number, item in enumerate(order, 1):
        if item >= 0:
            if (fqn := fqns[item]) in seen:
                windows.append(window)
                window, seen = [], set()
            seen.add(fqn)
        window.append(item)
        if len(window) >= most:
            windows.append(window)
            window, seen = [], set()
            if number >= QUIET_ITEMS:
                most = min(_GROWTH * most, MOST_ITEMS)
    return [*windows, window] if window else windows


class CommitWindows:
    """Places windows, and commits their items in order, as long as the planner leaves alone what comes later.

    Args:
        planner: the planner, of which only ``commit_tensor`` may be its own.
        resolved: all items, and where they go. No two boxes share memory.
        fqns: of the items.
        values: of the state dict, that the items are boxes of.
        place: brings the boxes of the window with a number into place, given the items of tensors in it. False if
            windows.py must try.
        load_bytes: loads the bytes entry with an index.
    """

    def __init__(
        self,
        planner: DefaultLoadPlanner,
        resolved: Resolved,
        fqns: list[str],
        values: list[Any],
        place: Callable[[int, Sequence[int]], bool],
        load_bytes: Callable[[int], None],
    ) -> None:
        self._planner = planner
        self._resolved = resolved
        self._fqns, self._values = fqns, values
        self._numbers, self._tensors = resolved.numbers, resolved.destinations.tensors
        self._place = place
        self._load_bytes = load_bytes
        self._boxes = _native.PlacedBoxes(
            PLAIN_TENSORS, self._fqns, self._values, self._numbers, self._tensors, TENSOR_TYPES
        )
        others = self._boxes.others() if type(planner.state_dict) is dict else range(len(self._values))
        with paused_collection():
            self._geometry = {
                number: geometry_of(self._tensors[number]) for number in {self._numbers[i] for i in others}
            }
        self._state = PlannerState(planner)

    def run(self, windows: Iterable[Sequence[int]]) -> Done:
        """Load windows, as :func:`windows_of` cuts them, one after another.

        Raises what a hook raises, with all before it in place and committed.
        """
        planner, placed, look = self._planner, self._boxes, self._is_as_resolved
        done = 0
        for number, window in enumerate(windows):
            boxes = [item for item in window if item >= 0]
            if not placed.are_as_resolved(planner.state_dict, boxes, look):
                return Done(done)
            try:
                if boxes and not self._place(number, boxes):
                    return Done(done)
            except Exception:
                return Done(done)  # it is raised again when all before it is committed
            self._state.keep_versions()
            placed.keep_versions(boxes)
            with paused_collection():
                items = self._resolved.take(boxes)
            committed, is_changed = placed.commit(
                planner, window, items, look, self._resolved.target, self._load_bytes, self._state.has_changed
            )
            done += committed
            if is_changed or committed < len(window):
                return Done(done, one_by_one=CHANGES if is_changed else "")
        return Done(done, is_all=True)

    def _is_as_resolved(self, box: int) -> bool:
        """Whether a box that PlacedBoxes does not know still goes where it went when all of them were resolved.

        Hooks may put or do anything.
        """
        state_dict, number = self._planner.state_dict, self._numbers[box]
        value, tensor, geometry = state_dict.get(self._fqns[box]), self._tensors[number], self._geometry.get(number)
        if value is not self._values[box] or geometry_of(tensor) != geometry:
            return False
        if value is tensor or (local := plain_local_tensor(value)) is tensor:
            return True
        if local is not None:
            return False
        found = tensor_in(state_dict, self._resolved.take([box])[0], value)
        return found is not None and geometry_of(found) == geometry
