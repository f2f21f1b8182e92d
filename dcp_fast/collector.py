"""A pause for Python's cyclic garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keep the cyclic garbage collector from running within.

    Metadata and plans consist of hundreds of thousands of small objects without cycles. While these are made, the
    collector would walk through all objects of the process again and again, which takes longer than to make them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
