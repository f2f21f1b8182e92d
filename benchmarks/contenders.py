"""The loaders under comparison, each as a function that loads once into given tensors and says how long it took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from benchmarks import gpus

# What a LoadReport says beside its fields.
REPORT_PROPERTIES = ("read_amplification", "total_seconds", "gigabytes_per_second")
# Stages of a LoadReport that torch's loader does inside ``read_data``.
READ_DATA_STAGES = ("layout", "transfer", "commit")


@dataclass(frozen=True)
class Sample:
    """One timed load."""

    seconds: float
    read_data_seconds: float | None = None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], Sample]
    # A ceiling may read into buffers of its own; then there is nothing to compare with torch.
    fills_destinations: bool = True


class HookedPlanner(DefaultLoadPlanner):
    """A planner of somebody's own that does next to nothing in its hook."""

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Look at what was loaded."""
        assert tensor.size() is not None


class ResolvingPlanner(HookedPlanner):
    """The same with both hooks that a tensor meets."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Hand on what torch's planner finds."""
        tensor: torch.Tensor = super().resolve_tensor(read_item)
        return tensor


# By name in workloads.
_HOOKED = {"commit": HookedPlanner, "both": ResolvingPlanner}


def torch_contender(
    checkpoint: Path, state: dict[str, Any], hooks: str = "", reader: Callable[[Path], StorageReader] | None = None
) -> Contender:
    """``reader``: makes torch's reader, if not that of DCP's own checkpoints."""
    return Contender("torch", lambda: load_with_torch(checkpoint, state, hooks, reader))


def dcp_fast_contender(checkpoint: Path, state: dict[str, Any], hooks: str = "") -> Contender:
    return Contender("dcp_fast", lambda: load_with_dcp_fast(checkpoint, state, hooks))


def load_with_torch(
    checkpoint: Path,
    state: dict[str, Any],
    hooks: str = "",
    make_reader: Callable[[Path], StorageReader] | None = None,
) -> Sample:
    start = time.perf_counter()
    reader = (make_reader or FileSystemReader)(checkpoint)
    read_data = _time_read_data(reader)
    with _no_dist_is_meant():
        planner = _HOOKED[hooks]() if hooks else DefaultLoadPlanner()
        load(dict(state), storage_reader=reader, planner=planner, no_dist=True)
    gpus.wait_for(gpus.of(state.values()))
    return Sample(time.perf_counter() - start, sum(read_data))


def load_with_dcp_fast(
    checkpoint: Path, state: dict[str, Any], hooks: str = "", options: Mapping[str, Any] | None = None
) -> Sample:
    """The options are the reader's own."""
    # Imported late: without a built extension the other contenders still run.
    import dcp_fast

    start = time.perf_counter()
    ours = dcp_fast.FileSystemReader if (checkpoint / ".metadata").exists() else dcp_fast.HuggingFaceStorageReader
    reader = ours(checkpoint, **(options or {}))
    read_data = _time_read_data(reader)
    with _no_dist_is_meant():
        planner = _HOOKED[hooks]() if hooks else dcp_fast.DefaultLoadPlanner()
        dcp_fast.load(dict(state), storage_reader=reader, planner=planner, no_dist=True)
    gpus.wait_for(gpus.of(state.values()))
    seconds = time.perf_counter() - start
    report = dcp_fast_report()
    stages = report["seconds"] or {}
    # A load that does not go through ``read_data`` tells the same from its stages.
    alone = sum(read_data) if read_data else sum(stages.get(stage, 0.0) for stage in READ_DATA_STAGES)
    return Sample(seconds, alone, report)


def dcp_fast_report() -> dict[str, Any]:
    """What dcp_fast says of the last load of this process."""
    import dcp_fast

    report = dcp_fast.last_report()
    assert report is not None
    fields = asdict(report)
    del fields["path"]
    return {**fields, **{name: getattr(report, name) for name in REPORT_PROPERTIES}}


def why_dcp_fast_is_missing() -> str | None:
    """None where dcp_fast can be used, else the reason why not."""
    try:
        import dcp_fast

        missing = [name for name in ("load", "FileSystemReader", "last_report") if not hasattr(dcp_fast, name)]
    except ImportError as error:
        return str(error)
    return f"it lacks {', '.join(missing)}" if missing else None


def _time_read_data(reader: StorageReader) -> list[float]:
    """Make the reader note how long each ``read_data`` takes.

    The method is replaced on the object and not in a subclass, so that the reader's type stays what loaders expect.
    """
    seconds: list[float] = []
    original = reader.read_data

    def read_data(plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        start = time.perf_counter()
        future = original(plan, planner)
        future.wait()
        seconds.append(time.perf_counter() - start)
        return future

    reader.read_data = read_data  # type: ignore[method-assign]
    return seconds


@contextmanager
def _no_dist_is_meant() -> Iterator[None]:
    """Silence the warning that a load without a process group is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
