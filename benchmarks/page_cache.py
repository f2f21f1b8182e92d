"""Putting files into the page cache, taking them out, and seeing whether they are there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 16 << 20
_scratch = bytearray(_BLOCK)


def populate(paths: Iterable[Path]) -> None:
    """Read every file through, so that all of it is cached."""
    for path in paths:
        with _opened(path) as fd:
            offset = 0
            while count := os.preadv(fd, [_scratch], offset):
                offset += count


def evict(paths: Iterable[Path]) -> None:
    """Drop every file from the page cache. Dirty pages cannot be dropped, so they are written first."""
    for path in paths:
        with _opened(path) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_fraction(paths: Iterable[Path], samples: int = 64) -> float | None:
    """The share of sampled pages that are cached, or None where the file system cannot tell.

    A read that must not wait succeeds only for a cached page. It may start readahead, so evict again afterwards.
    """
    hits = tried = 0
    page = bytearray(os.sysconf("SC_PAGE_SIZE"))
    for path in paths:
        size = path.stat().st_size
        with _opened(path) as fd:
            for index in range(min(samples, size // len(page))):
                tried += 1
                try:
                    hits += os.preadv(fd, [page], size * index // samples, os.RWF_NOWAIT) > 0
                except BlockingIOError:
                    pass
                except OSError:
                    return None
    return hits / tried if tried else None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
