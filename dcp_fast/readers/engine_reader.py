"""What readers that load through the engine have in common: their options, and the report of a load."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.observe.report import LoadReport, begin, current_report, last_report, publish
from dcp_fast.planning.planner import PLANS_ITSELF, DefaultLoadPlanner
from dcp_fast.readers.proof import class_name
from dcp_fast.this_load import option
from dcp_fast.transfer.gpu import CudaLoad
from dcp_fast.transfer.plan_transfer import PlanTransfer
from dcp_fast.transfer.records import Records
from dcp_fast.transfer.sharing import sharing
from dcp_fast.transfer.staging_limits import StagingLimits

IoName = Literal["auto", "cached", "direct", "mapped"]
_MODES = {
    "auto": _native.IoMode.AUTO,
    "cached": _native.IoMode.CACHED,
    "direct": _native.IoMode.DIRECT,
    "mapped": _native.IoMode.MAPPED,
}


class EngineReader(torch_filesystem.FileSystemReader):
    """Base of our readers, beside the reader of torch that each of them stands in for.

    Args:
        torchs: arguments of torch's reader.
        threads, block_bytes, staging_bytes, pinned_bytes, device_staging_bytes, synchronize, io, trace: as of
            :class:`dcp_fast.FileSystemReader`.
    """

    def __init__(
        self,
        *torchs: Any,
        threads: int | None,
        block_bytes: int | None,
        staging_bytes: int,
        pinned_bytes: int | None,
        device_staging_bytes: int | None,
        synchronize: bool,
        io: IoName,
        trace: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__(*torchs)
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
        self._report = LoadReport()  # of the load that this reader alone knows of: torch's load() runs it

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the checkpoint that was read; optionally turn to another one."""
        super().reset(checkpoint_id)
        self._report = LoadReport()

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
        report.note_slow_planner("" if isinstance(planner, DefaultLoadPlanner) else PLANS_ITSELF)
        try:
            return self._load(plan, planner, report)
        finally:
            publish(report)

    def staging_limits(self) -> StagingLimits:
        """What a load may use on its way to GPUs."""
        return StagingLimits.of(self.threads, self.block_bytes, self.pinned_bytes, self.device_staging_bytes)

    def _load(self, plan: LoadPlan, planner: LoadPlanner, report: LoadReport) -> Future[None]:
        report.reader_fallback_reason = self.why_slow()
        if report.reader_fallback_reason:
            with report.stage("transfer"):
                return super().read_data(plan, planner)
        with report.stage("commit"):
            self._read_natively(plan, planner, report)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_natively(self, plan: LoadPlan, planner: LoadPlanner, report: LoadReport) -> None:
        options = _native.Options(
            threads=self.threads or 0,
            block_bytes=self.block_bytes or 0,
            staging_bytes=self.staging_bytes,
            mode=_MODES[self.io],
            recorder=None if report.timeline is None else report.timeline.recorder,
        )
        records = self._records(options, report)
        exchange = sharing.get()
        sharing.set(None)  # it is for this load alone, and not for one within it
        cuda = CudaLoad(self.staging_limits, self.synchronize, report)
        try:
            PlanTransfer(plan, planner, records, options, self.staging_bytes, cuda, report, exchange).run()
        finally:
            report.reading_seconds += options.reading_seconds
            report.wait_seconds["disk"] += options.waiting_seconds

    @abstractmethod
    def why_slow(self) -> str:
        """Why torch's reader must read the data itself; empty if the engine reads."""

    @abstractmethod
    def _records(self, options: _native.Options, report: LoadReport) -> Records:
        """The records of the checkpoint, if the engine reads."""


def owned_by(reader: torch_filesystem.FileSystemReader, metadata: Metadata) -> Metadata:
    """Mark metadata as read by a reader. Returns it."""
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata
