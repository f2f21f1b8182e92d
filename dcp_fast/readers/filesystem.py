"""Checkpoints that torch's FileSystemWriter wrote, on a local or mounted file system."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from dcp_fast import _native
from dcp_fast._torch import ExtensionRegistry
from dcp_fast.collector import paused_collection
from dcp_fast.metadata.read import parse_metadata, read_metadata
from dcp_fast.observe.report import LoadReport, begin, current_report, last_report, publish
from dcp_fast.planning.hooks import why_planner_is_slow
from dcp_fast.planning.planner import DefaultLoadPlanner
from dcp_fast.readers.proof import LocalFiles, class_name, is_torchs_file_system, local_files
from dcp_fast.this_load import option
from dcp_fast.transfer.gpu import CudaLoad, StagingLimits
from dcp_fast.transfer.plan_transfer import PlanTransfer
from dcp_fast.transfer.records import Records

__all__ = ["FileSystemReader", "file_content", "owned_by", "read_metadata_of"]

_MODES = {
    "auto": _native.IoMode.AUTO,
    "cached": _native.IoMode.CACHED,
    "direct": _native.IoMode.DIRECT,
    "mapped": _native.IoMode.MAPPED,
}


class FileSystemReader(torch_filesystem.FileSystemReader):
    """Drop-in for ``torch.distributed.checkpoint.FileSystemReader`` that reads only the bytes that are needed.

    Works with any ``LoadPlanner``. Tensors land in host memory without a copy in between wherever the stored and the
    wanted layout allow it.

    Args:
        path: directory of the checkpoint.
        _extension_registry: as torch's, for stream transforms.
        threads: reader threads. By default one for each core that this process may use, by its affinity and control
            groups and divided by LOCAL_WORLD_SIZE; at most 16, and at least 4 where storage is read directly.
        block_bytes: the most that one request reads. At least 64 KiB. By default 4 MiB through the page cache, 16 MiB
            past it on the way to host memory, and 4 MiB on the way to GPUs. It is less where the threads together would
            need more than ``staging_bytes``.
        staging_bytes: host memory for bytes that cannot be read straight into place, for all threads together. Records
            that only ``torch.load`` can read are read ahead into as much again; one of them, while it is unpickled,
            takes its own size on top.
        pinned_bytes: host memory that copies to GPUs come from; only used if a destination lies on one, and kept for
            the next load until :func:`dcp_fast.release_staging`. At least 1 MiB; by default two blocks for each thread,
            and 64 MiB at least.
        device_staging_bytes: memory on each GPU for boxes that are placed by a kernel there, or converted. At least
            1 MiB; by default twice as much as ``pinned_bytes``. Only used if there are such boxes.
        synchronize: whether a load to GPUs returns only when all is in place, as torch's does. If not, work on the
            streams that are current during the load still finds all in place.
        io: ``"cached"`` reads through the page cache, ``"direct"`` past it (O_DIRECT, where the file system allows it),
            ``"mapped"`` copies from a mapping of the page cache; ``"auto"`` decides for each file by
            whether its bytes are in the page cache, and maps only files of local file systems.
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
        block_bytes: int | None = None,
        staging_bytes: int = 32 << 20,
        pinned_bytes: int | None = None,
        device_staging_bytes: int | None = None,
        synchronize: bool = True,
        io: Literal["auto", "cached", "direct", "mapped"] = "auto",
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
        self._report = LoadReport()  # of the load that this reader alone knows of: torch's load() runs it

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the checkpoint that was read; optionally turn to another one."""
        super().reset(checkpoint_id)
        self._report = LoadReport()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``, or ``__{rank}.metadata`` for the keyword ``rank``.

        Its dicts make their values when they are asked for; see :class:`dcp_fast.metadata.lazy.LazyDict`.

        Raises:
            OSError: as the file system does.
            CorruptMetadataError: the file is damaged.
            UntrustedMetadataError: it asks for what could run code.
        """
        with self.metadata_stage():
            return read_metadata_of(super().read_metadata, self, *args, **kwargs)

    @contextmanager
    def metadata_stage(self, received: bool = False) -> Iterator[None]:
        """What happens within is a stage of the load, also on a rank that gets the metadata from another one.

        Args:
            received: whether another rank read the file and sent its bytes here.
        """
        if current_report() is None:
            self._report = LoadReport()
            self._report.enter("planning")
        report = self._start_report()
        report.metadata_received = received
        try:
            with report.stage("metadata"), paused_collection():
                yield
        finally:
            if current_report() is None and report.timeline is not None:
                report.timeline.save()  # nobody else may come to do it

    def _start_report(self) -> LoadReport:
        """The report of the load that goes on, with a timeline if this reader is to write one."""
        report = current_report() or self._report
        report.path = report.path or str(self.path)
        trace = option(self, "trace")
        if trace is not None and report.timeline is None:
            report.record(trace)
        return report

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the metadata. Here, where the error of one rank reaches all, an unwritable trace is found out."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        if current_report() is None:
            if last_report() is self._report:  # that of a load which failed after this
                self._report = LoadReport()
            begin(self._report)
            self._report.enter("planning")
        report = self._start_report()
        if report.timeline is not None:
            report.timeline.write()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        if current_report() is None:
            self._report.enter("ranks")
        return super().prepare_local_plan(plan)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load all items of the plan; the future is done when this returns."""
        report = self._start_report()
        if current_report() is not None:
            return self._load(plan, planner, report)
        self._report = LoadReport()
        report.reader, report.planner = class_name(self), class_name(planner)
        report.planner_fallback_reason = why_planner_is_slow(planner, isinstance(planner, DefaultLoadPlanner))
        try:
            return self._load(plan, planner, report)
        finally:
            publish(report)

    def staging_limits(self) -> StagingLimits:
        """What a load may use on its way to GPUs."""
        return StagingLimits.of(self.threads, self.block_bytes, self.pinned_bytes, self.device_staging_bytes)

    def _load(self, plan: LoadPlan, planner: LoadPlanner, report: LoadReport) -> Future[None]:
        files = local_files(self)
        report.reader_fallback_reason = files.reason
        if files.reason:
            with report.stage("transfer"):
                return super().read_data(plan, planner)
        with report.stage("commit"):
            self._read_natively(files, plan, planner, report)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_natively(self, files: LocalFiles, plan: LoadPlan, planner: LoadPlanner, report: LoadReport) -> None:
        options = _native.Options(
            threads=self.threads or 0,
            block_bytes=self.block_bytes or 0,
            staging_bytes=self.staging_bytes,
            mode=_MODES[self.io],
            recorder=None if report.timeline is None else report.timeline.recorder,
        )
        records = Records(files.root, self.storage_data, self.transforms, options, report)
        cuda = CudaLoad(self.staging_limits, self.synchronize, report)
        try:
            PlanTransfer(plan, planner, records, options, self.staging_bytes, cuda, report).run()
        finally:
            report.reading_seconds += options.reading_seconds
            report.wait_seconds["disk"] += options.waiting_seconds


def read_metadata_of(
    torchs: Callable[..., Metadata], reader: torch_filesystem.FileSystemReader, *args: Any, **kwargs: Any
) -> Metadata:
    """Read metadata for a reader of torch's class, or one derived from it. ``torchs``: its own method, bound to it."""
    if option(reader, "trust_metadata", FileSystemReader.trust_metadata_by_default):
        return torchs(*args, **kwargs)
    path = reader._get_metadata_path(kwargs.get("rank"))
    if is_torchs_file_system(reader.fs):
        return owned_by(reader, read_metadata(str(path)))
    content = file_content(reader, path)
    return owned_by(reader, parse_metadata(content, str(path), partial(file_content, reader, path)))


def file_content(reader: torch_filesystem.FileSystemReader, path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file, by the reader's file system."""
    with reader.fs.create_stream(path, "rb") as file:
        content: bytes = file.read()
        return content


def owned_by(reader: torch_filesystem.FileSystemReader, metadata: Metadata) -> Metadata:
    """Mark metadata as read by a reader. Returns it."""
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata
