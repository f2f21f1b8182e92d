"""What limits the optimizer workload: the bytes of a rank, and nothing else, brought into memory by the rawest ways.

That memory is as fresh as that of a loader's result. Where the bytes lie is found before any clock starts, as for the
limits of the other workloads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ceilings, memory, optimizer_state
from benchmarks.destinations import Destinations
from benchmarks.payloads import payload_boxes, payload_segments
from benchmarks.workloads import MIB

PREAD = "pread"


def pread_setting(ranks: int) -> ceilings.Setting:
    """One reader for each core of the machine, which the ranks share."""
    return ceilings.Setting(_cores_of_a_rank(ranks), 4 * MIB)


class Limits:
    """Raw ways for this rank. All ranks call the same of them at the same time.

    Args:
        free_memory: gives memory that was freed back to the kernel.
        folder: where the program of ``memory`` is kept.
    """

    def __init__(self, checkpoint: Path, model: dict[str, Any], free_memory: Callable[[], None], folder: Path) -> None:
        self._model = model
        self._free_memory = free_memory
        self._folder = folder
        wanted = self._fresh()[1]
        segments = payload_segments(checkpoint, wanted)
        assert segments is not None, "ranks want whole rows, which are contiguous in the files"
        self._segments = segments
        self._boxes = payload_boxes(checkpoint, wanted)

    def pread(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was read, as it is in the result of a loader, and what is to be reported of it."""
        self._free_memory()
        result, wanted = self._fresh()
        memory_of = ceilings.into_tensors(wanted.local)
        setting = pread_setting(dist.get_world_size())
        return result, _timed(lambda: ceilings.read_segments(self._segments, setting, memory_of))

    def best_of_memory(self) -> tuple[ceilings.Setting, dict[str, float]]:
        """The setting with the best time of the slowest rank, and all times. The same on all ranks."""
        cores = _cores_of_a_rank(dist.get_world_size())
        tried: dict[ceilings.Setting, float] = {}
        for setting in memory.settings((cores, 2 * cores)):
            seconds = torch.tensor([min(self.memory(setting)[1]["seconds"] for _ in range(2))])
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            tried[setting] = seconds.item()
        best = min(tried, key=lambda setting: tried[setting])
        return best, {str(setting): seconds for setting, seconds in tried.items()}

    def memory(self, setting: ceilings.Setting) -> tuple[dict[str, Any], dict[str, Any]]:
        """As ``pread``."""
        self._free_memory()
        result, wanted = self._fresh()
        copies = memory.Copies(self._boxes, wanted.local, self._folder)
        return result, _timed(lambda: copies.run(setting))

    def _fresh(self) -> tuple[dict[str, Any], Destinations]:
        """Tensors for the moments of this rank, by parameter, and by the keys of the checkpoint."""
        wanted = Destinations({}, {})
        result: dict[str, Any] = {}
        for name, parameter in self._model.items():
            (shard,) = parameter.local_shards()
            result[name] = {moment: torch.empty_like(shard.tensor) for moment in optimizer_state.MOMENTS}
            for moment, tensor in result[name].items():
                key = f"{optimizer_state.OPTIMIZER_KEY}.state.{name}.{moment}"
                wanted.state[key], wanted.local[key] = parameter, tensor
        return result, wanted


def _timed(read: Callable[[], float]) -> dict[str, Any]:
    dist.barrier()
    start_cpu = time.process_time()
    seconds = read()
    return {"seconds": seconds, "cpu_seconds": time.process_time() - start_cpu, "metadata_reads": 0}


def _cores_of_a_rank(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)
