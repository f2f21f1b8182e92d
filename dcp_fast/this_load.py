"""What belongs to one load alone.

Readers and planners are the caller's, and loads in several threads may share a reader. So :func:`dcp_fast.load` sets
no option on them, and a reader keeps nothing of a load on itself. Both are notes of the load. The code that the load
calls finds them here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["notes_of", "option", "this_load"]

# Notes by the identity of the reader or planner that they are about. None outside of a load.
_notes: ContextVar[dict[int, dict[str, Any]] | None] = ContextVar("dcp_fast_load", default=None)


@contextmanager
def this_load(options: Iterable[tuple[object, str, Any]] = ()) -> Iterator[None]:
    """All that is called within is one load. A load within another one knows nothing of the outer one's notes.

    Args:
        options: those that hold for this load: the reader or planner, the name of its attribute, the value.
    """
    token = _notes.set({})
    try:
        for owner, name, value in options:
            notes_of(owner)[name] = value
        yield
    finally:
        _notes.reset(token)


def notes_of(owner: object) -> dict[str, Any]:
    """What this load notes about a reader or planner; the owner's own attributes if it is used outside of a load."""
    notes = _notes.get()
    return vars(owner) if notes is None else notes.setdefault(id(owner), {})


def option(owner: object, name: str) -> Any:
    """An option of a reader or planner, as this load was told; else as its owner was."""
    return notes_of(owner).get(name, getattr(owner, name))
