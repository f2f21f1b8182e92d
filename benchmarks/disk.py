"""What limits a cold load: plain reads of whole files, past the page cache and through it, into reused buffers."""

from __future__ import annotations

import itertools
import mmap
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.budget import Budget
from benchmarks.ceilings import Setting, TunedCeiling, opened, timed_on_threads, tuned
from benchmarks.workloads import MIB

NAME = "disk"
DIRECT, CACHED = "direct", "cached"
ALIGNMENT = 4096
# What is most likely to be best comes first, in case that there is no time for all.
BLOCKS = tuple(size * MIB for size in (16, 8, 4, 32, 2, 1))
THREADS = (4, 2, 8, 16)


def disk_ceiling(paths: list[Path], prepare: Callable[[], None], budget: Budget) -> TunedCeiling:
    """``prepare`` evicts the files before each reading. Where the file system refuses O_DIRECT, all are cached."""
    ways = (DIRECT, CACHED) if _allows_direct(paths) else (CACHED,)
    settings = [Setting(count, block, way=way) for way, block, count in itertools.product(ways, BLOCKS, THREADS)]
    buffers = [mmap.mmap(-1, max(BLOCKS)) for _ in range(max(THREADS))]
    for buffer in buffers:
        with suppress(OSError):  # of a system without such pages
            buffer.madvise(mmap.MADV_HUGEPAGE)  # a disk fills a large piece of memory in fewer operations
        buffer.write(bytes(len(buffer)))  # touch every page

    def run(setting: Setting) -> float:
        prepare()
        return _read(paths, setting, buffers)

    return tuned(NAME, run, settings, budget, fills_destinations=False)


def _allows_direct(paths: list[Path]) -> bool:
    try:
        with opened(paths, os.O_DIRECT):
            return True
    except OSError:
        return False


def _read(paths: list[Path], setting: Setting, buffers: list[mmap.mmap]) -> float:
    block = setting.block_bytes
    pieces = deque((path, offset) for path in paths for offset in range(0, path.stat().st_size, block))

    with opened(paths, os.O_DIRECT if setting.way == DIRECT else 0) as fds:

        def worker(index: int) -> None:
            with memoryview(buffers[index]) as buffer:
                while True:
                    try:
                        path, offset = pieces.popleft()
                    except IndexError:
                        return
                    # The length stays aligned at the end of the file, where the read is simply shorter.
                    done = 0
                    while done < block and (count := os.preadv(fds[path], [buffer[done:block]], offset + done)):
                        done += count
                        if done % ALIGNMENT:
                            break

        return timed_on_threads(setting.threads, worker)
