"""Ctrl-C during collective calls, which no rank may leave while others wait for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Ctrl-C of a time when this rank may not go.

    Args:
        handler: does what Ctrl-C does else.
        is_deferred: whether it comes here instead. It does not in threads, and where it is ignored.
    """

    def __init__(self, handler: Any, is_deferred: bool) -> None:
        self._handler = handler
        self.is_deferred = is_deferred
        self._struck: list[tuple[int, FrameType | None]] = []

    def strike(self) -> None:
        """Do what Ctrl-C would have done, if it came: this rank may go now."""
        if self._struck:
            first = self._struck[0]
            self._struck.clear()
            self._handler(*first)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let Ctrl-C interrupt what is done within. If it came before, it does so at once."""
        if not self.is_deferred:
            yield
            return
        signal.signal(signal.SIGINT, self._handler)
        try:
            self.strike()
            yield
        finally:
            signal.signal(signal.SIGINT, self.defer)

    def defer(self, number: int, frame: FrameType | None) -> None:
        """The handler that keeps Ctrl-C for later. A second one is not deferred."""
        self._struck.append((number, frame))
        if len(self._struck) > 1:
            self.strike()  # which may not raise


@contextmanager
def deferred_interrupt() -> Iterator[Interrupts]:
    """Keep Ctrl-C from taking this rank away between two collective calls, for which the others would wait.

    Yields:
        What strikes when the rank may go; at the latest that is done at the end.
    """
    handler = signal.getsignal(signal.SIGINT)
    interrupts = Interrupts(handler, callable(handler) and threading.current_thread() is threading.main_thread())
    if not interrupts.is_deferred:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts.defer)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, handler)
    interrupts.strike()
