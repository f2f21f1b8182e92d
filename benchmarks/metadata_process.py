"""Reads metadata and plans one rank's load, as the only work of a process, and says what that took.

    python -m benchmarks.metadata_process CHECKPOINT TENSORS RANKS CONTENDER

prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.metadata_files import COLUMNS, ROWS, fqns
from benchmarks.resident import reset_high_water_mark, status_bytes

# The rank that plans, one in the middle: the first and the last find their chunks at the ends of torch's lists.
RANK = 100
LOADING_RANKS = 384


@dataclass(frozen=True)
class Sample:
    """What one process took. Peaks are above what the process had before."""

    contender: str
    import_seconds: float  # of the contender, beyond torch.distributed.checkpoint
    read_seconds: float
    read_peak_bytes: int
    plan_seconds: float
    plan_peak_bytes: int
    items_seconds: float  # planning, and then looking at the plan's items
    peak_is_exact: bool
    items: int
    digest: str  # of all items, whatever their order


def rank_state(tensors: int, ranks: int) -> dict[str, torch.Tensor]:
    """What the planning rank holds of every tensor: DTensors on a mesh whose process group never communicates."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=LOADING_RANKS)
    mesh = DeviceMesh("cpu", list(range(LOADING_RANKS)))
    rows = ROWS * ranks
    each = -(-rows // LOADING_RANKS)
    held = max(0, min(rows, (RANK + 1) * each) - RANK * each)
    # Nobody writes to them, so they take no memory.
    return {
        fqn: DTensor.from_local(
            torch.empty(held, COLUMNS),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((rows, COLUMNS)),
            stride=(COLUMNS, 1),
        )
        for fqn in fqns(tensors)
    }


def run(checkpoint: Path, tensors: int, ranks: int, contender: str) -> Sample:
    reader_of: Callable[[Path], StorageReader] = FileSystemReader
    planner_of: Callable[[], LoadPlanner] = DefaultLoadPlanner
    start = time.perf_counter()
    if contender == "dcp_fast":
        import dcp_fast

        reader_of, planner_of = dcp_fast.FileSystemReader, dcp_fast.DefaultLoadPlanner
    import_seconds = time.perf_counter() - start
    state = rank_state(tensors, ranks)

    exact = reset_high_water_mark()
    before, start = status_bytes("VmRSS"), time.perf_counter()
    metadata = reader_of(checkpoint).read_metadata()
    read_seconds = time.perf_counter() - start
    read_peak = status_bytes("VmHWM") - before

    reset_high_water_mark()
    before, start = status_bytes("VmRSS"), time.perf_counter()
    planner = planner_of()
    planner.set_up_planner(state, metadata, is_coordinator=False)
    plan = planner.create_local_plan()
    plan_seconds = time.perf_counter() - start
    plan_peak = status_bytes("VmHWM") - before
    start = time.perf_counter()
    items = len(plan.items)
    return Sample(
        contender=contender,
        import_seconds=import_seconds,
        read_seconds=read_seconds,
        read_peak_bytes=read_peak,
        plan_seconds=plan_seconds,
        plan_peak_bytes=plan_peak,
        items_seconds=plan_seconds + time.perf_counter() - start,
        peak_is_exact=exact,
        items=items,
        digest=_digest(plan),
    )


def _digest(plan: LoadPlan) -> str:
    lines = sorted(
        f"{item.type} {item.dest_index} {item.dest_offsets} {item.storage_index} {item.storage_offsets} {item.lengths}"
        for item in plan.items
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def die_first() -> None:
    """Where memory runs out after all, the kernel is to end this process and no other."""
    Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    _checkpoint, _tensors, _ranks, _contender = sys.argv[1:]
    die_first()
    print(json.dumps(asdict(run(Path(_checkpoint), int(_tensors), int(_ranks), _contender))))
