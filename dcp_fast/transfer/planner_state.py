"""Watches what a planner with hooks keeps, to notice that one call of a hook may depend on another."""

from __future__ import annotations

import datetime
import functools
import logging
import operator
import re
import struct
import sys
import types
import weakref
import zoneinfo
from _random import Random
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from itertools import chain
from operator import is_
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadPlanner

from dcp_fast import _native

# Each does to one container what a hook did.
Change = list[Callable[[], None]]

_CONTAINERS = (dict, list, set, deque)
_LEAVES = (
    *(type, ModuleType, FunctionType, str, bytes, int, float, complex, torch.dtype, torch.device, torch.Size),
    # What tells a planner nothing, or holds nothing but what a class has anyway.
    *(logging.Logger, logging.Handler, functools.cached_property, BaseException),
)
# Of a container with more elements only the number of them is watched: to look at thousands for each item would take
# longer than all else. A planner that keeps something for each item has it under a key of its own.
_MOST_ELEMENTS = 64
_MOST_CONTAINERS = 64
_DEPTH = 3
# What torch's planner has: these change as the load goes on, and are looked at item by item.
_OF_TORCH = ("state_dict", "original_state_dict", "mappings", "metadata")


# Packages whose objects with slots are of no concern.
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "dcp_fast"})
_OF_C = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE (CPython's Include/object.h), which classes of Python never have
_ONLY_ADD = ("append", "add", "extend", "update")  # what a planner has of a container by these tells it nothing
_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
# Classes of C whose objects never change, or have what changes in their ``__dict__``, or are looked into.
_UNCHANGING = frozenset(
    {
        *(object, frozenset, range, slice, types.EllipsisType, types.NotImplementedType),
        *(Decimal, types.SimpleNamespace),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.tzinfo, datetime.timezone),
        *(re.Pattern, re.Match, weakref.ref, operator.itemgetter, operator.attrgetter, operator.methodcaller, partial),
        *(property, staticmethod, classmethod, type(functools.lru_cache(len)), types.CodeType, types.UnionType),
        *(types.GenericAlias, types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType),
        *(types.GetSetDescriptorType, types.MemberDescriptorType, struct.Struct, zoneinfo.ZoneInfo, *_METHODS),
    }
)
_UNCHANGING_OF_NUMPY = {"numpy.generic", "numpy.dtype", "numpy.ufunc", "numpy._ArrayFunctionDispatcher"}


class PlannerState:
    """The attributes of a planner and of its classes, and what these hold: containers, objects and tensors.

    Attributes:
        is_hidden: whether some of that may change with nobody noticing.
    """

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner
        self.is_hidden = False
        self.keep()

    def keep(self) -> None:
        """Changes are told from here on."""
        self._seen: dict[int, Any] = {}
        self._watched: list[tuple[Any, list[Any]]] = []  # containers and their elements
        self._large: list[tuple[Any, int]] = []  # containers and how many elements they have
        self._tensors: list[tuple[torch.Tensor, int]] = []
        attributes: dict[str, Any] = getattr(self._planner, "__dict__", {})
        self._watch(attributes, 0)
        # Classes cannot be put back, but a planner that keeps something there is noticed at its first item.
        classes: list[tuple[object, list[Any]]] = []
        for cls in type(self._planner).__mro__:
            if cls.__module__.partition(".")[0] not in ("torch", "builtins", "abc", "dcp_fast"):
                values = list(vars(cls).values())
                if _native.holds(cls, values):  # not so for a class of an extension, to which nobody can add anything
                    classes.append((cls, values))
                for value in vars(cls).values():
                    self._walk(value, 1)
        self._plain = classes + [pair for pair in self._watched if _native.holds(*pair) is not None]
        self._others = [pair for pair in self._watched if _native.holds(*pair) is None]

    def keep_versions(self) -> None:
        """Tensors were written to by the load itself."""
        self._tensors = [(tensor, version_of(tensor)) for tensor, _ in self._tensors]

    def has_changed(self) -> bool:
        # Asked after each call of a hook, so that it may take no longer than the call.
        if not _native.all_hold(self._plain, self._large):
            return True
        if self._others and not all(_holds(container, elements) for container, elements in self._others):
            return True
        return bool(self._tensors) and any(version_of(tensor) != version for tensor, version in self._tensors)

    def take_back(self) -> Change:
        """Put back what containers held. Returns what does again what was done to them. Tensors stay as they are."""
        change = []
        for container, elements in self._watched:
            if not _holds(container, elements):
                change.append(_change_of(container, elements))
                _fill(container, elements)
        return change

    def _walk(self, value: Any, depth: int) -> None:
        if isinstance(value, _LEAVES) or value is None or id(value) in self._seen:
            return
        if isinstance(value, torch.Tensor):
            self._seen[id(value)] = value
            self._tensors.append((value, version_of(value)))
        elif isinstance(value, _CONTAINERS):
            self._watch(value, depth)
        elif isinstance(value, tuple):
            for element in value[:_MOST_ELEMENTS]:
                self._walk(element, depth)
        elif isinstance(value, _METHODS):
            if not (type(value.__self__) in _CONTAINERS and value.__name__ in _ONLY_ADD):
                self._walk(value.__self__, depth)
        elif isinstance(value, MappingProxyType):
            self._walk(tuple(value.values()), depth)
        else:
            if isinstance(value, partial):
                self._walk((value.func, *value.args, value.keywords), depth)
            self.is_hidden = self.is_hidden or _hides(value)
            if isinstance(attributes := getattr(value, "__dict__", None), dict):
                self._watch(attributes, depth)

    def _watch(self, container: Any, depth: int) -> None:
        if id(container) in self._seen or len(self._watched) >= _MOST_CONTAINERS:
            return
        self._seen[id(container)] = container
        if len(container) > _MOST_ELEMENTS:
            self._large.append((container, len(container)))
            return
        self._watched.append((container, _elements(container)))
        if depth >= _DEPTH:
            return
        if depth > 0:
            values: Iterator[Any] = iter(container.values() if isinstance(container, dict) else container)
        else:
            values = iter([value for name, value in container.items() if name not in _OF_TORCH])
            self._large += [
                (value, len(value)) for name in _OF_TORCH if isinstance(value := container.get(name), _CONTAINERS)
            ]
        for value in list(values):
            self._walk(value, depth + 1)


def hides_state(planner: LoadPlanner) -> bool:
    """Whether a planner may change with nobody noticing: some of its attributes have slots."""
    return any(vars(cls).get("__slots__") for cls in type(planner).__mro__)


def _hides(value: Any) -> bool:
    """Whether an object has contents that can change and are not in its ``__dict__``: slots of users, or what C keeps.

    That is memory, and whether a lock is held, what a queue holds, where an iterator is, and the like.
    """
    if isinstance(value, torch.Generator | Random):
        return True
    classes = type(value).__mro__
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in classes}
    is_unchanging = not names.isdisjoint(_UNCHANGING_OF_NUMPY) and "numpy.void" not in names
    for cls in classes:
        is_frozen = getattr(vars(cls).get("__dataclass_params__"), "frozen", False)
        room = cls.__module__.partition(".")[0]
        if vars(cls).get("__slots__") and not is_frozen and room not in _NOT_OF_USERS:
            return True
        if cls.__flags__ & _OF_C and cls not in _UNCHANGING and room != "torch" and not is_unchanging:
            return True
    return False


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; always 0 where nobody counts."""
    try:
        return tensor._version
    except RuntimeError:  # of inference mode
        return 0


def counts_writes(value: Any) -> bool:
    """Whether a tensor counts how often it is written to. What is no tensor has none that are not counted."""
    try:
        return not (isinstance(value, torch.Tensor) and value.is_inference())
    except RuntimeError:  # a ShardedTensor has no memory of its own, and allows no such question
        return True


def writes_to(tensor: torch.Tensor, value: Any) -> int:
    """How often a tensor was written to that a value of a state dict is or has. Never less than before."""
    # Operations on a DTensor count with it alone, not with its local tensor.
    of_value = version_of(value) if value is not tensor and isinstance(value, torch.Tensor) else 0
    return version_of(tensor) + of_value


def _elements(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _holds(container: Any, elements: list[Any]) -> bool:
    known = _native.holds(container, elements)
    if known is not None:
        return known
    if isinstance(container, dict):
        return 2 * len(container) == len(elements) and all(map(is_, chain(container, container.values()), elements))
    return len(container) == len(elements) and all(map(is_, container, elements))


def _change_of(container: Any, before: list[Any]) -> Callable[[], None]:
    """What was done to a container, to be done again to whatever it holds then: other hooks may change it meanwhile."""
    if isinstance(container, dict):
        half = len(before) // 2
        old = dict(zip(before[:half], before[half:], strict=True))
        new = {key: value for key, value in container.items() if key not in old or old[key] is not value}
        gone = [key for key in old if key not in container]

        def change_dict() -> None:
            for key in gone:
                container.pop(key, None)
            container.update(new)

        return change_dict
    now = list(container)
    if isinstance(container, set):
        more, less = container.difference(before), set(before).difference(container)

        def change_set() -> None:
            container.difference_update(less)
            container.update(more)

        return change_set
    if len(now) >= len(before) and all(map(is_, now, before)):
        return partial(container.extend, now[len(before) :])
    return partial(_fill, container, now)


def _fill(container: Any, elements: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(elements) // 2
        container.update(zip(elements[:half], elements[half:], strict=True))
    else:
        add: Callable[[list[Any]], None] = container.update if isinstance(container, set) else container.extend
        add(elements)
