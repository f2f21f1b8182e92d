"""What each rank of the optimizer workload does: real gloo processes, spawned for one task and gone after it.

A rank leaves what it found in a JSON file, which the process that spawned it reads.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.storage import StorageReader
from torch.multiprocessing.spawn import spawn

from benchmarks import checkpoints, memory, optimizer_state, page_cache, resident
from benchmarks.contenders import dcp_fast_report
from benchmarks.optimizer_limits import PREAD, Limits

# What a rank reports of one load.
RankLoad = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What the ranks of one world are to do. It travels to them by pickle."""

    kind: Literal["verify_and_time", "first_load"]
    checkpoint: Path
    spec: checkpoints.CheckpointSpec
    entrants: tuple[str, ...]
    rounds: int = 1
    # Of what ``memory`` runs; None where that cannot be built.
    program_folder: Path | None = None


def run_ranks(task: Task, ranks: int) -> list[dict[str, Any]]:
    """Do a task in fresh processes, and return what each rank found."""
    with tempfile.TemporaryDirectory() as scratch:
        spawn(_as_rank, args=(task, ranks, scratch), nprocs=ranks)  # type: ignore[no-untyped-call]
        return [json.loads(_found(scratch, rank).read_text()) for rank in range(ranks)]


def _as_rank(rank: int, task: Task, ranks: int, scratch: str) -> None:
    # Loaders that deprecate what they call, or name a device for gloo, say so once a tensor.
    warnings.simplefilter("ignore")
    # All ranks share this machine's cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=ranks)
    try:
        model = optimizer_state.model_state(task.spec.shapes())
        found = _verify_and_time(task, model) if task.kind == "verify_and_time" else _first_load(task, model)
        _found(scratch, rank).write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _found(scratch: str, rank: int) -> Path:
    return Path(scratch) / f"rank{rank}.json"


def _verify_and_time(task: Task, model: dict[str, Any]) -> dict[str, Any]:
    # torch comes last: until then the right bytes were never in this process, so that memory which a loader leaves as
    # it was cannot pass for loaded. All are warmed up by this as well.
    loaded = {name: _load(name, task, model)[0] for name in reversed(task.entrants)}
    differing = {
        name: list(optimizer_state.differences(loaded["torch"], loaded[name]))
        for name in task.entrants
        if name != "torch"
    }
    limits = Limits(task.checkpoint, model, _return_free_memory, task.program_folder or Path())
    raw: dict[str, Callable[[], tuple[dict[str, Any], RankLoad]]] = {PREAD: limits.pread}
    found: dict[str, Any] = {}
    if task.program_folder is not None:
        best, found["tried"] = limits.best_of_memory()
        found["best"] = [best.way, best.block_bytes, best.threads]
        raw[memory.NAME] = lambda: limits.memory(best)
    for name, read in raw.items():
        _check_raw(name, read()[0], loaded["torch"][optimizer_state.OPTIMIZER_KEY]["state"])
    loaded.clear()

    loads: dict[str, Callable[[], RankLoad]] = {
        name: lambda name=name: _load(name, task, model)[1]  # type: ignore[misc]
        for name in task.entrants
    }
    for name, read in raw.items():
        loads[name] = lambda read=read: read()[1]  # type: ignore[misc]
    samples: dict[str, list[RankLoad]] = {name: [] for name in loads}
    names = list(loads)
    for index in range(task.rounds):
        if dist.get_rank() == 0:
            page_cache.populate(checkpoints.files_of(task.checkpoint))
        # Each round begins with another contender, so that none always follows the same one.
        start = index % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(loads[name]())
    return {"differing": differing, "samples": samples, "memory": found}


def _check_raw(name: str, read: dict[str, Any], state: dict[str, Any]) -> None:
    whole = {parameter: {moment: state[parameter][moment] for moment in read[parameter]} for parameter in read}
    pairs = zip(optimizer_state.local_tensors(read), optimizer_state.local_tensors(whole), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs), f"{name} fetches other bytes than torch does"


def _first_load(task: Task, model: dict[str, Any]) -> dict[str, Any]:
    (name,) = task.entrants
    if name == "dcp_fast":
        import dcp_fast  # noqa: F401 - its code is no part of the load
    _return_free_memory()
    with resident.watched() as peaks:
        result, sample = _load(name, task, model)
    sizes = sum(tensor.nbytes for tensor in optimizer_state.local_tensors(result))
    return {
        **sample,
        "peak_bytes": peaks.all_bytes - sizes,
        "private_peak_bytes": peaks.private_bytes - sizes,
        "mapped_peak_bytes": peaks.mapped_bytes,
        "peak_is_exact": peaks.is_exact,
    }


def _load(name: str, task: Task, model: dict[str, Any]) -> tuple[dict[str, Any], RankLoad]:
    """One load by all ranks at once."""
    load: Callable[..., dict[str, Any]] = load_sharded_optimizer_state_dict
    reader_of: Callable[[Path], StorageReader] = FileSystemReader
    if name == "dcp_fast":
        import dcp_fast

        load, reader_of = dcp_fast.load_sharded_optimizer_state_dict, dcp_fast.FileSystemReader
    _return_free_memory()
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    reader = reader_of(task.checkpoint)
    metadata_reads = _count_metadata_reads(reader)
    result = load(model, optimizer_state.OPTIMIZER_KEY, reader)
    sample: RankLoad = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "metadata_reads": len(metadata_reads),
    }
    if name == "dcp_fast":
        sample |= {"report": dcp_fast_report(), "staging_bytes": getattr(reader, "staging_bytes", None)}
    return result, sample


def _return_free_memory() -> None:
    """Give memory that earlier loads freed back to the kernel.

    Both loaders allocate their result. Each is to find as much fresh memory as a job that resumes, not the pages that
    the one before it happened to leave in the heap.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, other C libraries need not
    if trim is not None:
        trim(0)


def _count_metadata_reads(reader: StorageReader) -> list[None]:
    """Make the reader append to the list each time it reads metadata; see contenders for why it is done this way."""
    calls: list[None] = []
    original = reader.read_metadata

    def read_metadata(*args: Any, **kwargs: Any) -> Metadata:
        calls.append(None)
        return original(*args, **kwargs)

    reader.read_metadata = read_metadata  # type: ignore[method-assign]
    return calls
