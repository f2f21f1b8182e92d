"""What each rank of the sharing benchmark does: real gloo processes, which load through storage of one bandwidth."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.multiprocessing.spawn import spawn

__all__ = ["LAYOUTS", "RANKS", "WAYS", "Case", "Load", "run_ranks", "save"]

RANKS = 8
WAYS = ("torch", "alone", "shared")
# Mesh and placements of each.
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "whole by all": ((RANKS,), [Replicate()]),
    "HSDP 2x4": ((2, RANKS // 2), [Replicate(), Shard(0)]),
    "rows to columns": ((RANKS,), [Shard(1)]),
}


@dataclass(frozen=True)
class Case:
    """What is loaded, and through which storage.

    Attributes:
        layout: of LAYOUTS.
        bytes_per_second: of all ranks together; 0: the page cache.
        latency_seconds: of each request.
    """

    layout: str
    bytes_per_second: float
    latency_seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """One load of all ranks: the seconds of the slowest, what the storage gave, and what is in the reports."""

    seconds: float
    storage_bytes: int
    read_bytes: int
    received_bytes: int
    needed_bytes: int
    waiting_seconds: float
    most_read_bytes: int
    differing: int


def save(path: Path, tensors: int, rows: int, columns: int) -> None:
    """Save a checkpoint by rows of all ranks, in processes of their own."""
    _spawn(_save, path, tensors, rows, columns)


def run_ranks(path: Path, case: Case, ways: tuple[str, ...], rounds: int) -> dict[str, list[Load]]:
    """Load in some of WAYS, in turns, in fresh processes."""
    of_ranks = _spawn(_time, path, case, ways, rounds)
    found: dict[str, list[Load]] = {}
    for way in ways:
        found[way] = []
        for number in range(rounds):
            loads = [Load(**of_rank[way][number]) for of_rank in of_ranks]
            found[way].append(
                Load(
                    seconds=max(load.seconds for load in loads),
                    storage_bytes=max(load.storage_bytes for load in loads),
                    read_bytes=sum(load.read_bytes for load in loads),
                    received_bytes=sum(load.received_bytes for load in loads),
                    needed_bytes=sum(load.needed_bytes for load in loads),
                    waiting_seconds=max(load.waiting_seconds for load in loads),
                    most_read_bytes=max(load.read_bytes for load in loads),
                    differing=sum(load.differing for load in loads),
                )
            )
    return found


def _spawn(work: Callable[..., Any], *args: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as scratch:
        spawn(_as_rank, args=(work, args, scratch), nprocs=RANKS)  # type: ignore[no-untyped-call]
        return [json.loads((Path(scratch) / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def _as_rank(rank: int, work: Callable[..., Any], args: tuple[Any, ...], scratch: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=RANKS)
    try:
        dist.barrier()
        found = work(scratch, *args)
        (Path(scratch) / f"rank{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _save(_: str, path: Path, tensors: int, rows: int, columns: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    part = rows // RANKS
    state: dict[str, Any] = {}
    for number in range(tensors):
        torch.manual_seed(number * RANKS + dist.get_rank())
        state[f"layers.{number}.weight"] = DTensor.from_local(torch.rand(part, columns), mesh, [Shard(0)])
    torch_save({"model": state, "sizes": [tensors, rows, columns]}, checkpoint_id=path)


def _state_dict(path: Path, layout: str) -> dict[str, Any]:
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    model = {
        name: zeros(cast(Any, entry).size, device_mesh=mesh, placements=placements)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    return {"model": {name.removeprefix("model."): value for name, value in model.items()}}


def _time(scratch: str, path: Path, case: Case, ways: tuple[str, ...], rounds: int) -> dict[str, list[dict[str, Any]]]:
    state = _state_dict(path, case.layout)
    locals_ = {name: value.to_local() for name, value in state["model"].items()}
    _load("torch", path, state, Case(case.layout, 0), scratch)
    expected = {name: value.clone() for name, value in locals_.items()}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            for value in locals_.values():
                value.zero_()
            dist.barrier()
            load = _load(way, path, state, case, f"{scratch}/{way}{number}")
            differing = sum(not torch.equal(value, expected[name]) for name, value in locals_.items())
            dist.barrier()
            found[way].append({**load, "differing": differing})
    return found


def _load(way: str, path: Path, state: dict[str, Any], case: Case, storage_file: str) -> dict[str, Any]:
    import dcp_fast
    from dcp_fast import _native

    storage = None
    if case.bytes_per_second:
        storage = _native.SlowStorage(
            storage_file, bytes_per_second=case.bytes_per_second, latency_seconds=case.latency_seconds
        )
    start = time.perf_counter()
    if way == "torch":
        torch_load(state, storage_reader=FileSystemReader(path) if storage is None else _SlowReader(path, storage))
    elif storage is None:
        dcp_fast.load(state, checkpoint_id=path, share_reads=way == "shared")
    else:
        with storage:
            dcp_fast.load(state, checkpoint_id=path, share_reads=way == "shared")
    seconds = time.perf_counter() - start
    dist.barrier()
    report = dcp_fast.LoadReport() if way == "torch" else dcp_fast.last_report()
    assert report is not None
    return asdict(
        Load(
            seconds=seconds,
            storage_bytes=0 if storage is None else storage.bytes,
            read_bytes=report.bytes_read,
            received_bytes=report.bytes_received,
            needed_bytes=report.bytes_needed,
            waiting_seconds=report.wait_seconds["ranks"],
            most_read_bytes=report.bytes_read,
            differing=0,
        )
    )


class _SlowFile:
    """A file whose reads wait for the storage."""

    def __init__(self, file: IO[bytes], storage: Any) -> None:
        self._file = file
        self._storage = storage

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._storage.take(len(content))
        return content

    def readinto(self, buffer: Any) -> int:
        count: int = cast(Any, self._file).readinto(buffer)
        self._storage.take(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _SlowReader(FileSystemReader):
    """torch's reader, from the same storage."""

    def __init__(self, path: Path, storage: Any) -> None:
        super().__init__(path)
        self._storage = storage

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        return cast(IO[bytes], _SlowFile(super()._slice_file(file, sinfo), self._storage))
