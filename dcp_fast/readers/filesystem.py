"""Checkpoints that torch's FileSystemWriter wrote, on a local or mounted file system."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from dcp_fast import _native
from dcp_fast._torch import ExtensionRegistry, StorageReaderTransforms
from dcp_fast.collector import paused_collection
from dcp_fast.drop_in import DropIn
from dcp_fast.metadata.read import parse_metadata, read_metadata
from dcp_fast.observe.report import LoadReport, begin, publish
from dcp_fast.observe.trace import Timeline, saved
from dcp_fast.this_load import notes_of, option
from dcp_fast.transfer.gpu import DEFAULT_BLOCK_BYTES, CudaLoad, StagingLimits
from dcp_fast.transfer.plan_transfer import PlanTransfer
from dcp_fast.transfer.records import Records

__all__ = ["FileSystemReader"]

_MODES = {"auto": _native.IoMode.AUTO, "cached": _native.IoMode.CACHED, "direct": _native.IoMode.DIRECT}


@dataclass
class _Progress:
    """What a reader knows of a load between its own methods, which a load calls one after another.

    Attributes:
        planning_started: a reading of ``time.perf_counter``, 0 before and after planning.
    """

    report: LoadReport = field(default_factory=LoadReport)
    timeline: Timeline | None = None
    planning_started: float = 0.0


class FileSystemReader(torch_filesystem.FileSystemReader, metaclass=DropIn):
    """Drop-in for ``torch.distributed.checkpoint.FileSystemReader`` that reads only the bytes that are needed.

    Works with any ``LoadPlanner``. Tensors land in host memory without a copy in between wherever the stored and the
    wanted layout allow it.

    Args:
        path: directory of the checkpoint.
        _extension_registry: as torch's, for stream transforms.
        threads: reader threads. By default one for each core that this process may use, by its affinity and control
            groups and divided by LOCAL_WORLD_SIZE; at most 16, and at least 4 where storage is read directly.
        block_bytes: the most that one request reads. At least 64 KiB.
        staging_bytes: host memory for bytes that cannot be read straight into place, for all threads together. A single
            record that only ``torch.load`` can read takes its own size on top.
        pinned_bytes: host memory that copies to GPUs come from; only used if a destination lies on one, and kept for
            the next load until :func:`dcp_fast.release_staging`. At least 1 MiB; by default two blocks for each thread,
            and 64 MiB at least.
        device_staging_bytes: memory on each GPU for boxes that are placed by a kernel there, or converted. At least
            1 MiB; by default twice as much as ``pinned_bytes``. Only used if there are such boxes.
        synchronize: whether a load to GPUs returns only when all is in place, as torch's does. If not, work on the
            streams that are current during the load still finds all in place.
        io: ``"cached"`` reads through the page cache, ``"direct"`` past it (O_DIRECT, where the file system allows it);
            ``"auto"`` decides for each file by whether its bytes are in the page cache.
        trace: a file for the timeline of each load, as Chrome trace events (https://ui.perfetto.dev opens it). It is
            written anew for each load, also for one that fails. ``{rank}`` in it stands for the rank; without it, rank
            0 writes the file itself, and each other rank appends ``.rankN``.
        trust_metadata: unpickle ``.metadata`` as torch does, which runs whatever code the file names. By default
            only the types that DCP writes are made, and nothing is run. None: False, or as :func:`dcp_fast.install`
            was told.

    Raises (from ``read_data``; ``dcp.load`` wraps them in ``CheckpointException``):
        LoadError: see :mod:`dcp_fast.errors`.

    Raises (from ``set_up_storage_reader``, before anything is planned or read; likewise wrapped):
        OSError: the trace cannot be written. If only its end cannot, the load succeeds with a warning in the log.
    """

    trust_metadata_by_default: ClassVar[bool] = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: ExtensionRegistry | None = None,
        *,
        threads: int | None = None,
        block_bytes: int = DEFAULT_BLOCK_BYTES,
        staging_bytes: int = 32 << 20,
        pinned_bytes: int | None = None,
        device_staging_bytes: int | None = None,
        synchronize: bool = True,
        io: Literal["auto", "cached", "direct"] = "auto",
        trace: str | os.PathLike[str] | None = None,
        trust_metadata: bool | None = None,
    ) -> None:
        super().__init__(path, _extension_registry)
        if io not in _MODES:
            raise ValueError(f"io must be one of {sorted(_MODES)}, got {io!r}")
        for name, value in (("threads", threads), ("block_bytes", block_bytes), ("staging_bytes", staging_bytes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        StagingLimits.check(pinned_bytes, device_staging_bytes)
        self.threads = threads
        self.block_bytes = block_bytes
        self.staging_bytes = staging_bytes
        self.pinned_bytes = pinned_bytes
        self.device_staging_bytes = device_staging_bytes
        self.synchronize = synchronize
        self.io = io
        self.trace = None if trace is None else os.fsdecode(trace)
        self.trust_metadata = self.trust_metadata_by_default if trust_metadata is None else trust_metadata

    @property
    def _progress(self) -> _Progress:
        progress: _Progress = notes_of(self).setdefault("_progress", _Progress())
        return progress

    @_progress.setter
    def _progress(self, progress: _Progress) -> None:
        notes_of(self)["_progress"] = progress

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the checkpoint that was read; optionally turn to another one."""
        super().reset(checkpoint_id)
        self._progress = _Progress()

    def _start_timeline(self) -> Timeline | None:
        progress = self._progress
        trace = option(self, "trace")
        progress.timeline = None if trace is None else Timeline(trace)
        if progress.timeline is not None:
            progress.report.trace_stages(progress.timeline)
        return progress.timeline

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``, or ``__{rank}.metadata`` for the keyword ``rank``.

        Its dicts make their values when they are asked for; see :class:`dcp_fast.metadata.LazyDict`.

        Raises:
            OSError: as the file system does.
            CorruptMetadataError: the file is damaged.
            UntrustedMetadataError: it asks for what could run code.
        """
        with self._metadata_stage():
            if option(self, "trust_metadata"):
                return super().read_metadata(*args, **kwargs)
            path = self._get_metadata_path(kwargs.get("rank"))
            if type(self.fs) is torch_filesystem.FileSystem:
                return self._own(read_metadata(str(path)))
            return self._own(parse_metadata(self.file_content(path), str(path), partial(self.file_content, path)))

    def file_content(self, path: str | os.PathLike[str]) -> bytes:
        """All bytes of a file, by the reader's file system."""
        with self.fs.create_stream(path, "rb") as file:
            content: bytes = file.read()
            return content

    # A rank that receives the metadata from another one does these two things as well: see ranks/shared_metadata.py.

    @contextmanager
    def _metadata_stage(self, received: bool = False) -> Iterator[None]:
        """A load begins: what happens within is its first stage.

        Args:
            received: whether another rank read the file and sent its bytes here.
        """
        progress = self._progress = _Progress(LoadReport(path=str(self.path), metadata_received=received))
        begin(progress.report)
        with saved(self._start_timeline()), progress.report.stage("metadata"), paused_collection():
            yield
        progress.planning_started = time.perf_counter()

    def _own(self, metadata: Metadata) -> Metadata:
        """Mark metadata as read by this reader."""
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the metadata. Here, where the error of one rank reaches all, an unwritable trace is found out."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        timeline = self._progress.timeline or self._start_timeline()  # none yet: somebody else read the metadata
        if timeline is not None:
            timeline.write()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        progress = self._progress
        if progress.planning_started:
            progress.report.add_stage("planning", progress.planning_started)
            progress.planning_started = 0.0
        return super().prepare_local_plan(plan)

    def _reads_plain_files(self) -> bool:
        # Whoever puts another file system, view or transform below torch's reader deals in Python streams.
        return (
            type(self.fs) is torch_filesystem.FileSystem
            and type(self.transforms) is StorageReaderTransforms
            and type(self)._slice_file is torch_filesystem.FileSystemReader._slice_file
            and "_slice_file" not in vars(self)
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load all items of the plan; the future is done when this returns."""
        progress, self._progress = self._progress, _Progress()
        progress.report.path = str(self.path)
        with saved(progress.timeline):
            recorder = None if progress.timeline is None else progress.timeline.recorder
            return self._load(plan, planner, progress.report, recorder)

    def staging_limits(self) -> StagingLimits:
        """What a load may use on its way to GPUs."""
        return StagingLimits.of(self.threads, self.block_bytes, self.pinned_bytes, self.device_staging_bytes)

    def _load(
        self, plan: LoadPlan, planner: LoadPlanner, report: LoadReport, recorder: _native.TraceRecorder | None
    ) -> Future[None]:
        if not self._reads_plain_files():
            with report.stage("transfer"):
                future = super().read_data(plan, planner)
            publish(report)
            return future
        options = _native.Options(
            threads=self.threads or 0,
            block_bytes=self.block_bytes,
            staging_bytes=self.staging_bytes // 2,
            mode=_MODES[self.io],
            recorder=recorder,
        )
        records = Records(self.path, self.storage_data, self.transforms, options, report)
        cuda = CudaLoad(self.staging_limits, self.synchronize, report)
        try:
            PlanTransfer(plan, planner, records, options, self.staging_bytes, cuda, report).run()
        finally:
            report.reading_seconds = options.reading_seconds
            report.wait_seconds["disk"] = options.waiting_seconds
            publish(report)
        future = Future()
        future.set_result(None)
        return future
