"""What is noticed of a planner with hooks, and which tensors its hooks get."""

from __future__ import annotations

import datetime
import functools
import io
import itertools
import logging
import queue
import random
import re
import struct
import threading
import zoneinfo
from collections import OrderedDict, deque
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hooked_planners import write_mixed
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast
from dcp_fast.transfer.planner_state import PlannerState

LARGE = 10**6


class Keeping(dcp.DefaultLoadPlanner):
    note: ClassVar[list[int]] = [LARGE]

    def __init__(self) -> None:
        super().__init__()
        self.count = LARGE
        self.table = {"a": LARGE, "b": [LARGE]}
        self.ordered = OrderedDict(a=1, b=2)
        self.names = {"x", "y"}
        self.queue = deque([LARGE, LARGE])
        self.tensor = torch.zeros(2)


class OfAnExtension(dcp.DefaultLoadPlanner, datetime.timedelta):
    """Inherits from a class that is not Python's to change."""


def equal_but_another() -> int:
    return int(str(LARGE))


CHANGES: dict[str, Callable[[Keeping], Any]] = {
    "attribute": lambda planner: setattr(planner, "count", equal_but_another()),
    "new attribute": lambda planner: setattr(planner, "more", None),
    "no attribute": lambda planner: delattr(planner, "count"),
    "dict": lambda planner: planner.table.update(a=equal_but_another()),
    "key": lambda planner: planner.table.update(c=planner.table.pop("a")),
    "order": lambda planner: planner.table.update(a=planner.table.pop("a")),
    "list": lambda planner: planner.table["b"].__setitem__(0, equal_but_another()),  # type: ignore[index]
    "longer list": lambda planner: planner.table["b"].append(1),  # type: ignore[attr-defined]
    "ordered dict": lambda planner: planner.ordered.move_to_end("a"),
    "set": lambda planner: planner.names.add("z"),
    "deque": lambda planner: planner.queue.rotate(1) or planner.queue.append(3),
    "tensor": lambda planner: planner.tensor.add_(1),
    "list of the class": lambda planner: planner.note.append(2),
    "class": lambda planner: setattr(type(planner), "note", planner.note[:]),
    "new in the class": lambda planner: setattr(type(planner), "more", 1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_are_noticed(kind: str) -> None:
    cls = type("Own", (Keeping,), {"note": [LARGE], "__module__": __name__})
    planner = cls()
    state = PlannerState(planner)
    assert not state.has_changed()
    CHANGES[kind](planner)
    assert state.has_changed()
    state.keep()
    assert not state.has_changed()


class Counter:
    def __init__(self) -> None:
        self.count = LARGE

    def append(self) -> None:
        self.count += 1


class WithObjects(dcp.DefaultLoadPlanner):
    """Keeps what real planners keep."""

    table: ClassVar[Any] = MappingProxyType({"a": 1})

    def __init__(self) -> None:
        super().__init__()
        self.logger = logging.getLogger("of a planner")
        self.handler = logging.StreamHandler()
        self.error = ValueError("kept", [1])
        self.functions = [np.add, np.linalg.norm, len, partial(print, end=""), re.compile("a").match]
        self.values = (np.float32(1), np.dtype("i4"), Path("a"), Decimal(1), datetime.timezone.utc, torch.float32)
        self.packed = struct.Struct("<I")
        self.zone = zoneinfo.ZoneInfo("UTC")
        self.add = [].append

    @functools.cached_property
    def cached(self) -> int:
        return 1


def test_what_does_not_change_is_not_hidden() -> None:
    assert not PlannerState(WithObjects()).is_hidden


@pytest.mark.parametrize(
    "kept",
    [
        *(threading.Lock(), itertools.count(), itertools.count().__next__, iter([1]), queue.SimpleQueue()),
        *(random.Random(), torch.Generator(), np.random.default_rng(), np.zeros(1), io.BytesIO(), bytearray(1)),
    ],
    ids=lambda kept: type(kept).__name__,
)
def test_what_may_change_with_nobody_noticing(kept: Any) -> None:
    planner = dcp.DefaultLoadPlanner()
    planner.kept = [kept]  # type: ignore[attr-defined]
    assert PlannerState(planner).is_hidden


def test_methods_of_objects_tell_of_these() -> None:
    """Whatever they are called."""
    planner = dcp.DefaultLoadPlanner()
    planner.tick = Counter().append  # type: ignore[attr-defined]
    state = PlannerState(planner)
    planner.tick()  # type: ignore[attr-defined]
    assert state.has_changed()


def test_classes_of_extensions_do_not_change() -> None:
    assert not PlannerState(OfAnExtension()).has_changed()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(12, 9, dtype=torch.int32),
        lambda: torch.zeros(9, 12, dtype=torch.int32).t(),
        lambda: torch.nn.Parameter(torch.zeros(12, 9)),
        lambda: torch.zeros(12, 18)[:, ::2],
    ],
)
def test_hooks_get_the_boxes_of_a_whole_tensor(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    write_mixed(tmp_path, torch.ones(6, 2, dtype=torch.float16))

    def seen_by(load: Callable[..., None]) -> Any:
        state = {"z": make(), "half": torch.zeros(6, 2)}
        seen: list[Any] = []

        class Looking(dcp.DefaultLoadPlanner):
            def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
                whole = state[item.dest_index.fqn]
                assert tensor is not whole
                place = (tensor.data_ptr() - whole.data_ptr(), tensor.size(), tensor.stride(), tensor.requires_grad)
                seen.append((item, place, tensor.is_leaf, tensor.tolist()))

        load(state, checkpoint_id=tmp_path, planner=Looking())
        return seen, state["z"].tolist()

    assert seen_by(dcp_fast.load) == seen_by(dcp.load)
