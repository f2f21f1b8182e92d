"""The workloads of headers alone: reading those of many safetensors files, and planning one rank's load of them."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks import checkpoints, huggingface
from benchmarks.contenders import Sample
from benchmarks.destinations import fake_mesh
from benchmarks.measure import Measurement, Options, Say
from benchmarks.verify import VerificationError
from benchmarks.workloads import Temperature, Workload

PLANNING = "hf_plan"

# Of each contender: what reads the metadata, and what plans with it.
Contenders = dict[str, tuple[Callable[[], Any], Callable[[Any], LoadPlan]]]


def run(workload: Workload, options: Options, say: Say) -> Measurement:
    """Compare the plans of both, then time them in turns."""
    say(f"{workload.name}: {workload.title}")
    checkpoint = checkpoints.ensure(workload.checkpoint, options.data)
    state = _state(workload)
    contenders = _contenders(checkpoint, state, options.with_dcp_fast)
    # Metadata that was read into objects stays: what others make of it slows down Python's collector for all alike.
    metadata = {name: read() for name, (read, _) in contenders.items()}
    if len({_digest(plan(metadata[name])) for name, (_, plan) in contenders.items()}) > 1:
        raise VerificationError("the plans differ")
    if workload.name != PLANNING:
        metadata.clear()
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for _ in range(options.rounds or workload.rounds):
        for name, (read, plan) in contenders.items():
            gc.collect()
            start = time.perf_counter()
            result = plan(metadata[name]) if workload.name == PLANNING else read()
            samples[name].append(Sample(time.perf_counter() - start))
            del result
    measurement = Measurement(workload, Temperature.WARM, samples)
    times = (f"{name} {measurement.median(name):.3f} s" for name in samples)
    say(f"  {Temperature.WARM.value}: {', '.join(times)}")
    return measurement


def _contenders(checkpoint: Path, state: dict[str, Any], with_dcp_fast: bool) -> Contenders:
    def planned_by(planner_class: type[DefaultLoadPlanner]) -> Callable[[Any], LoadPlan]:
        def plan(metadata: Any) -> LoadPlan:
            planner = planner_class()
            planner.set_up_planner(state, metadata, is_coordinator=False)
            return planner.create_local_plan()

        return plan

    def torchs() -> Any:
        return huggingface.reader_of_torch(checkpoint).read_metadata()

    contenders: Contenders = {"torch": (torchs, planned_by(DefaultLoadPlanner))}
    if with_dcp_fast:
        import dcp_fast

        def ours() -> Any:
            return dcp_fast.HuggingFaceStorageReader(checkpoint).read_metadata()

        contenders["dcp_fast"] = (ours, planned_by(dcp_fast.DefaultLoadPlanner))
    return contenders


def _state(workload: Workload) -> dict[str, Any]:
    """One rank's shards of rows, without memory for their elements: nobody writes to them."""
    kind, mesh = workload.checkpoint.kind, fake_mesh(workload.wanted)
    return {
        name: _shard(shape, huggingface.dtype_of(kind, name), mesh)
        for name, shape in workload.checkpoint.shapes().items()
    }


def _shard(shape: tuple[int, ...], dtype: torch.dtype, mesh: DeviceMesh) -> DTensor:
    rows, columns = shape
    held = min(rows, -(-rows // mesh.size()))  # of the first rank
    local = torch.empty(1, dtype=dtype).expand(held, columns)
    size, stride = torch.Size(shape), (columns, 1)
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)


def _digest(plan: LoadPlan) -> str:
    digest = hashlib.sha256()
    for item in plan.items:
        where = (item.dest_index, item.dest_offsets, item.storage_index, item.storage_offsets, item.lengths)
        digest.update(repr(where).encode())
    return digest.hexdigest()
