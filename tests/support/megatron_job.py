"""A job that imports a framework before or after dcp_fast is installed, or has no dcp_fast, and loads with it.

    python megatron_job.py CHECKPOINT HOSTILE_CHECKPOINT RESULTS

Each order of imports is a process of its own, forked from one that has imported torch alone: that takes seconds. What
was loaded, and what the reports say, goes to a file RESULTS/ORDER/found.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint

ORDERS = ("torch", "before", "after")
VALUES = ("args", "rng_state/shard_0_2", "rng_state/shard_1_2")


def run(order: str, checkpoint: Path, hostile: Path, results: Path) -> None:
    os.chdir(results / order)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if order == "before":
        import megatron_like
    if order != "torch":
        import dcp_fast

        assert ("megatron_like" in sys.modules) == (order == "before")
        dcp_fast.install()
    import megatron_like

    found: dict[str, Any] = {"first": loads(checkpoint)}
    if order == "torch":
        assert not any(name.partition(".")[0] == "dcp_fast" for name in sys.modules)
    else:
        found["made directories"] = [makes_a_directory(hostile)]
        dcp_fast.uninstall()
        found["metadata that was kept"] = loads(checkpoint)
        megatron_like.CachedReader.cached.clear()
        found["uninstalled"] = loads(checkpoint)
        found["made directories"].append(makes_a_directory(hostile))
    torch.save(found, "found")
    dist.destroy_process_group()


def loads(path: Path) -> dict[str, Any]:
    """What the framework gets in each way that it loads, for each rank of two, and what the metadata says then."""
    import megatron_like

    model = [name for name in megatron_like.SHAPES if name not in megatron_like.FLOAT8]
    found: dict[str, Any] = {}
    for rank in range(2):
        for way, load in megatron_like.WAYS.items():
            found[f"{way}, rank {rank}"] = loaded(load, megatron_like.empty_state(rank, model, VALUES), path)
        megatron_like.SWAPS.clear()
        quantized = megatron_like.empty_state(rank, megatron_like.SHAPES, VALUES)
        found[f"float8, rank {rank}"] = loaded(megatron_like.load_as_megatron, quantized, path)
        assert megatron_like.SWAPS
    metadata: Any = megatron_like.CachedReader(path).read_metadata()
    return {"loads": found, "mcore_data": metadata.mcore_data, "all_local_plans": metadata.all_local_plans}


def loaded(load: Any, state: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The values of a state, and the report of dcp_fast if it has loaded it."""
    import megatron_like

    before = last_report()
    load(state, path)
    report = last_report()
    said = None if report is before else dataclasses.asdict(report) | {"is_fast": report.is_fast}
    return megatron_like.local_values(state), said


def last_report() -> Any:
    module: Any = sys.modules.get("dcp_fast")
    return module.last_report() if module else None


def makes_a_directory(hostile: Path) -> bool:
    """Load a checkpoint whose metadata has an attribute that makes a directory when it is unpickled."""
    import megatron_like

    megatron_like.load_as_megatron(megatron_like.empty_state(0, ["decoder.final_norm.weight"]), hostile)
    return Path("made").exists()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(order, *map(Path, sys.argv[1:]))) for order in ORDERS]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
