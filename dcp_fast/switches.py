"""Functions that stand in the place of torch's: while dcp_fast is installed they do its work, otherwise torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

_are_on = False
# By switch: the function whose place it takes. Whoever kept a switch may call it after the installation.
_originals: dict[object, Callable[..., Any]] = {}


def switch(original: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``fast`` while switches are on, and ``original`` otherwise. It looks like ``original``."""

    @functools.wraps(original)
    def switched(*args: Any, **kwargs: Any) -> Any:
        return (fast if _are_on else original)(*args, **kwargs)

    _originals[switched] = original
    return switched


def method_switch(original: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a method, as its class has it. ``fast`` gets the original, bound to the object, before all else."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fast(functools.partial(original, self), self, *args, **kwargs)

    return switch(original, call)


def are_on() -> bool:
    """Whether switches are on."""
    return _are_on


def set_switches(on: bool) -> None:
    """Turn all switches on or off."""
    global _are_on
    _are_on = on


def original_of(function: Any) -> Any:
    """What a switch stands for; anything else itself."""
    return _originals.get(function, function) if isinstance(function, FunctionType) else function
