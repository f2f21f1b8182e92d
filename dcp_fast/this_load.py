"""Options that hold for one load alone.

Readers and planners are the caller's, and loads in several threads may share a reader. So :func:`dcp_fast.load` sets
no option on them. The code that the load calls finds the options here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Each is the reader or planner, the name of its attribute, and the value.
Options = Iterable[tuple[object, str, Any]]

# By the identity of the reader or planner, and the name.
_options: ContextVar[Mapping[tuple[int, str], Any] | None] = ContextVar("dcp_fast_options", default=None)
_is_trusted: ContextVar[bool] = ContextVar("dcp_fast_is_trusted", default=False)


@contextmanager
def this_load(options: Options) -> Iterator[None]:
    """All that is called within is one load. A load within another one knows nothing of the outer one's options."""
    token = _options.set({(id(owner), name): value for owner, name, value in options})
    trust = _is_trusted.set(False)
    try:
        yield
    finally:
        _is_trusted.reset(trust)
        _options.reset(token)


def option(owner: object, name: str, default: Any = None) -> Any:
    """An option of a reader or planner, as this load was told; else as its owner was.

    Args:
        owner: the reader or planner.
        name: of its attribute.
        default: what an owner without the attribute has, which is one of torch's class.
    """
    told = _options.get() or {}
    return told.get((id(owner), name), getattr(owner, name, default))


@contextmanager
def trusted() -> Iterator[None]:
    """Within, torch's own method unpickles what it reads, as its caller trusts that."""
    token = _is_trusted.set(True)
    try:
        yield
    finally:
        _is_trusted.reset(token)


def is_trusted() -> bool:
    """Whether :func:`trusted` holds."""
    return _is_trusted.get()
