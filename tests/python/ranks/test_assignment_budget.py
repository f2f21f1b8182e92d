"""What it takes a rank of a large job to assign reads to ranks: processor time and memory, of a process of its own."""

from __future__ import annotations

import re
import time
from array import array
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from dcp_fast import _native

RANKS, RANKS_PER_NODE = 512, 8
TENSORS, ROWS, ROW_BYTES = 1000, 4096, 16384
RECORD_GAP = 1345  # of headers between payloads
ITEMSIZE = 2
ROUND_BYTES = 32 << 20

SECONDS = 2.0
SHARED_PROCESSOR = 1.5  # times as long, where others have the caches and the other half of a core
MEMORY_BYTES = 200_000_000


def encode(begin: int, loops: list[tuple[int, int]]) -> torch.Tensor:
    """A need of one box in each tensor of a file, as ranks send it to each other (``csrc/exchange/need.cpp``).

    Args:
        begin: of the box, in the tensor.
        loops: of the box, as sizes and strides.
    """
    name = b"__0_0.distcp"
    stored = ROWS * ROW_BYTES + RECORD_GAP
    head = array("q", [1, TENSORS, TENSORS * len(loops), TENSORS * stored, 0, len(name)])
    head.frombytes(name + bytes(-len(name) % 8))
    boxes = torch.tensor([0, len(loops), begin, ITEMSIZE]).repeat(TENSORS, 1)
    boxes[:, 2] += torch.arange(TENSORS) * stored
    return torch.cat([torch.tensor(head), boxes.flatten(), torch.tensor(loops).flatten().repeat(TENSORS)])


def need_of(layout: str, number: int, count: int) -> torch.Tensor:
    """One of ``count`` different needs."""
    if layout == "columns":
        width = ROW_BYTES // count
        return encode(number * width, [(ROWS, ROW_BYTES), (width, 1)])
    height = ROWS // count
    return encode(number * height * ROW_BYTES, [(height * ROW_BYTES, 1)])


def memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def assign(layout: str, count: int, times: int) -> tuple[float, int]:
    """Assign a job whose ranks have ``count`` different needs; again, up to some times, where that takes too long.

    Returns:
        The least processor time; and the most memory that the first time took, needs included.
    """
    needs = [need_of(layout, number, count) for number in range(count)]
    before, more_bytes = memory("VmRSS"), 0
    seconds = []
    for _ in range(times):
        began = time.process_time()
        exchange = _native.Exchange(
            needs=[(need.data_ptr(), need.nbytes) for need in needs],
            need_of_rank=[rank % count for rank in range(RANKS)],
            node_of_rank=[rank // RANKS_PER_NODE for rank in range(RANKS)],
            rank=0,
            need=None,
            send_bytes=ROUND_BYTES,
            receive_bytes=ROUND_BYTES,
        )
        seconds.append(time.process_time() - began)
        more_bytes = more_bytes or memory("VmHWM") - before
        assert exchange.obstacle == ""
        assert exchange.rounds > 3
        del exchange
        if seconds[-1] < SECONDS:
            break
    return min(seconds), more_bytes + sum(need.nbytes for need in needs)


@pytest.mark.parametrize(("layout", "needs"), [("rows", RANKS), ("columns", RANKS), ("rows", 8), ("rows", 1)])
def test_a_job_of_512_ranks_and_1000_tensors(fresh_ranks: Ranks, layout: str, needs: int) -> None:
    """Ranks that all need something else, replicas of eight, and replicas alone."""
    [(seconds, more_bytes)] = fresh_ranks.run(1, assign, layout, needs, 3)
    assert seconds < SECONDS * SHARED_PROCESSOR
    assert 0 < more_bytes < MEMORY_BYTES
