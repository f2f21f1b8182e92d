"""Ctrl-C during collective calls, which no rank may leave while others wait for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Keep Ctrl-C from taking this rank away between two collective calls, for which the others would wait.

    Yields:
        What may be called when the rank may go: it does what Ctrl-C would have done, if it came. At the latest that is
        done at the end. A second Ctrl-C is not deferred.
    """
    handler = signal.getsignal(signal.SIGINT)
    struck: list[tuple[int, FrameType | None]] = []

    def strike() -> None:
        if struck and callable(handler):
            first = struck[0]
            struck.clear()
            handler(*first)

    def defer(number: int, frame: FrameType | None) -> None:
        struck.append((number, frame))
        if len(struck) > 1:
            strike()  # which may not raise

    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield strike
        return
    signal.signal(signal.SIGINT, defer)
    try:
        yield strike
    finally:
        signal.signal(signal.SIGINT, handler)
    strike()
