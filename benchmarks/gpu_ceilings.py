"""What the machine can do on the way to its GPUs: the two halves of a load, each alone, with no checkpoint logic.

``pinned pread``: several threads read exactly the payload bytes, each into one pinned buffer that it reuses.
``pinned copy``: as many bytes are copied from pinned memory to the GPUs, a part to each of them at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

import torch

from benchmarks import gpus
from benchmarks.budget import Budget
from benchmarks.ceilings import Setting, TunedCeiling, cores, read_segments, tuned
from benchmarks.destinations import Destinations, bytes_of
from benchmarks.payloads import Segment, payload_segments
from benchmarks.workloads import MIB

PINNED_READ = "pinned pread"
PINNED_COPY = "pinned copy"
# One thread enqueues the copies. A bus needs a few megabytes at a time to reach its full speed.
COPY_SETTINGS = tuple(Setting(1, block) for block in (4 * MIB, 16 * MIB, 64 * MIB))
READ_THREADS = (4, 8, 12, 16)
# Requests, and the buffers that they are read into. A buffer that stays in the processor's cache is filled faster. To
# ask for as little at a time is another matter: Python's threads wait for each other between requests.
READ_SIZES = ((4 * MIB, 1 * MIB), (8 * MIB, 2 * MIB), (8 * MIB, 8 * MIB))


def pinned_read_ceiling(checkpoint: Path, destinations: Destinations, budget: Budget) -> TunedCeiling | None:
    """None where what is wanted is not contiguous in the files, so that no plain read can fetch just that."""
    segments = payload_segments(checkpoint, destinations)
    return None if segments is None else read_ceiling(segments, budget)


def read_ceiling(segments: list[Segment], budget: Budget) -> TunedCeiling:
    """Reads of these ranges, wherever they belong."""
    settings = read_settings()
    largest = max(setting.buffer_bytes or 0 for setting in settings)
    memory = [_pinned(largest) for _ in range(max(setting.threads for setting in settings))]
    buffers = [bytes_of(buffer) for buffer in memory]

    def run(setting: Setting) -> float:
        size = setting.buffer_bytes or setting.block_bytes

        def memory_of(segment: Segment, thread: int) -> list[memoryview]:
            buffer = buffers[thread]
            return [buffer[: min(size, segment.length - start)] for start in range(0, segment.length, size)]

        return read_segments(segments, setting, memory_of)

    return tuned(PINNED_READ, run, settings, budget, fills_destinations=False)


def read_settings() -> list[Setting]:
    """More threads than cores are not tried, but a few are."""
    counts = {count for count in READ_THREADS if count <= max(cores(), min(READ_THREADS))}
    counts |= {min(cores(), 32)}
    return [Setting(count, *sizes) for sizes in READ_SIZES for count in sorted(counts)]


def copy_ceiling(count: int, devices: Collection[torch.device], budget: Budget) -> TunedCeiling:
    """Copies of ``count`` bytes altogether, on the current stream of each device."""
    largest = max(setting.block_bytes for setting in COPY_SETTINGS)
    source = _pinned(largest)
    targets = [torch.empty(largest, dtype=torch.uint8, device=device) for device in devices]

    def run(setting: Setting) -> float:
        gpus.wait_for(devices)
        start = time.perf_counter()
        left = count
        while left > 0:
            for target in targets:
                length = max(0, min(setting.block_bytes, left))
                target[:length].copy_(source[:length], non_blocking=True)
                left -= length
        gpus.wait_for(devices)
        return time.perf_counter() - start

    return tuned(PINNED_COPY, run, COPY_SETTINGS, budget, fills_destinations=False)


def _pinned(count: int) -> torch.Tensor:
    memory = torch.empty(count, dtype=torch.uint8, pin_memory=True)
    return memory.fill_(0)
