"""Steps of a load that all ranks take together. If one rank fails in a step, no other rank goes on or waits for it.

torch gathers every rank's plan on one rank and scatters them again, although loading changes nothing in between. Here
one flag of each rank for each step tells whether any has failed. Errors are only gathered if there are any.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from torch.distributed.checkpoint.storage import StorageReader

from dcp_fast._torch import DistWrapper, dcp_method_logger, get_failure_dict, wrap_exception
from dcp_fast.errors import LoadError, MetadataAccessError
from dcp_fast.observe.report import LoadReport, joined_report
from dcp_fast.planning.planner import PLANS_ITSELF, faster_method
from dcp_fast.ranks.collectives import Outcome, largest
from dcp_fast.ranks.exchange import EXCHANGE_BYTES, Exchange, GroupError, OtherRankError, check_sharing
from dcp_fast.ranks.interrupts import deferred_interrupt
from dcp_fast.ranks.shared_metadata import share_metadata
from dcp_fast.readers.others import metadata_of, read_plan, why_alone, why_metadata_is_slow
from dcp_fast.readers.proof import class_name
from dcp_fast.transfer.quantization import with_dequantized_chunks
from dcp_fast.transfer.sharing import sharing

logger = logging.getLogger("dcp_fast")

# Bits of the flag of a rank: its planner or reader needs the plans of all ranks; something has failed on it.
_GATHER_PLANS, _FAILED = 1, 2
# What a rank says of sharing reads. One that shares adds how much memory it has for that, in kilobytes.
_DOES_NOT_SHARE, _CANNOT_SHARE, _SHARES = 0, 1, 2
_WORD_UNIT = 1 << 10

# As they are at import: a step that somebody patches into torch's class later counts as the planner's or reader's own.
_DEFAULT_STEPS: list[tuple[type, str, Any]] = [
    (LoadPlanner, "create_global_plan", torch_planner.DefaultLoadPlanner.create_global_plan),
    (LoadPlanner, "finish_plan", torch_planner.DefaultLoadPlanner.finish_plan),
    (StorageReader, "prepare_global_plan", torch_filesystem.FileSystemReader.prepare_global_plan),
]


def load_on_all_ranks(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    planner: LoadPlanner,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    metadata: Metadata | None = None,
    share: bool = False,
    share_reads: bool | None = None,
    exchange_bytes: int = EXCHANGE_BYTES,
) -> None:
    """What ``torch.distributed.checkpoint`` does to load a state dict once reader and planner are there.

    Plans are only gathered if the planner or the reader of some rank does something in the global step. Otherwise a
    successful load takes two collective calls, each of a few bytes, and those of ``share`` and ``share_reads``.

    Args:
        state_dict, storage_reader, planner, process_group, coordinator_rank, no_dist: as those of ``load_state_dict``.
        metadata: of the checkpoint, if the caller has read it already.
        share: whether one rank reads the metadata for all, where that is possible. The same on all ranks.
        share_reads: whether each byte is read by one rank alone, where that is possible. None: as ``install`` was told.
        exchange_bytes: memory of this rank for what it exchanges with others then.

    Raises:
        ValueError: ``share_reads`` differs between ranks.
        CheckpointException: on every rank if any rank failed. A rank that has only metadata of its own raises its own
            error instead, as in torch. Flags and errors go through the host where the process group has a backend for
            that, and so even if a rank's GPU is lost.
    """
    with joined_report() as report:
        report.reader, report.planner = class_name(storage_reader), class_name(planner)
        report.path = _path_of(storage_reader)
        ranks = DistWrapper(process_group, not no_dist, coordinator_rank)
        wrong = Outcome(partial(check_sharing, share_reads, exchange_bytes)).error
        wants = wrong is None and (Exchange.by_default if share_reads is None else share_reads)
        sharing_reads = _ShareReads(exchange_bytes if wants else 0, ranks, report, wrong)
        _load(state_dict, storage_reader, planner, ranks, metadata, share, sharing_reads, report)


class _ShareReads:
    """Whether ranks share reads: what this rank wants, and what all can.

    Args:
        exchange_bytes: memory for the exchange; 0 if this rank does not want to share.
        ranks: of the load.
        report: tells why nothing is shared.
        wrong: an error of the arguments that this rank was given, which the first step raises for all ranks.
    """

    def __init__(
        self, exchange_bytes: int, ranks: DistWrapper, report: LoadReport, wrong: BaseException | None = None
    ) -> None:
        self.wrong = wrong
        self._exchange_bytes = exchange_bytes
        self._ranks = ranks
        self._report = report
        self._obstacle = ""
        self._exchange: Exchange | None = None
        if exchange_bytes and not ranks.use_dist:
            self._obstacle = "the load is one of a single process"
        elif exchange_bytes and ranks.get_world_size() == 1:
            self._obstacle = "the process group has one rank"
        report.sharing_fallback_reason = self._obstacle

    def look_at(self, reader: StorageReader, metadata: Metadata | None, has_global_metadata: bool) -> None:
        """Find out whether this rank can share."""
        if not self._exchange_bytes or self._obstacle:
            return
        try:
            self._obstacle = why_alone(reader) if has_global_metadata else "this rank has metadata of its own"
            # What tells its checkpoint from others.
            save_id = str(getattr(getattr(metadata, "storage_meta", None), "save_id", None) or "")
            self._exchange = Exchange(self._ranks, self._exchange_bytes, save_id, self._report)
        except Exception as error:  # of a property of the reader, or of its metadata
            self._obstacle = f"its reader or metadata cannot be looked at: {error!r}"

    @property
    def word(self) -> int:
        """What this rank tells the others."""
        if self._exchange_bytes and not self._obstacle:
            return _SHARES + self._exchange_bytes // _WORD_UNIT
        return _CANNOT_SHARE if self._exchange_bytes else _DOES_NOT_SHARE

    def agree(self, lowest: int, highest: int) -> None:
        """Take the lowest and the highest word of all ranks.

        Raises:
            ValueError: on all ranks, if not all have been told the same.
        """
        if lowest == _DOES_NOT_SHARE and highest != _DOES_NOT_SHARE:
            raise ValueError("share_reads must be the same on all ranks")
        if lowest < _SHARES:
            self._exchange = None
        elif self._exchange is not None:
            self._exchange.most_bytes = (lowest - _SHARES) * _WORD_UNIT
        if lowest == _CANNOT_SHARE:
            self._report.sharing_fallback_reason = self._obstacle or "another rank cannot share reads"

    @contextmanager
    def offered(self) -> Iterator[None]:
        """Within, the reader finds the exchange with other ranks, if there is one."""
        token = sharing.set(self._exchange)
        try:
            yield
        finally:
            sharing.reset(token)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """For each number the largest that any rank has. Collective.

        Ranks that share notice at once when another one dies.
        """
        return largest(self._ranks, numbers, torch.int32) if self._exchange is None else self._exchange.largest(numbers)

    def read(self, read_data: Callable[[], None]) -> Outcome[None]:
        """Read, with or without others, none of whom waits for this rank then. Ctrl-C must not come between."""
        outcome = Outcome(read_data)
        exchange = self._exchange
        if exchange is not None:
            if outcome.error is None and exchange.left > 0:
                self._report.note_reads_alone("its reader did not ask the other ranks for anything")
            while exchange.left > 0:
                outcome = Outcome(partial(exchange.leave, outcome.error))
            exchange.close()
        return outcome


def _load(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    planner: LoadPlanner,
    ranks: DistWrapper,
    metadata: Metadata | None,
    share: bool,
    share_reads: _ShareReads,
    report: LoadReport,
) -> None:
    arguments: dict[str, Any] = {}
    if (checkpoint_id := getattr(storage_reader, "checkpoint_id", None)) is not None:
        arguments = {"checkpoint_id": checkpoint_id, "process_group": ranks.group}
    has_global_metadata = True
    shared: Callable[[], Metadata] | None = None
    if share and metadata is None and ranks.get_world_size() > 1:
        with report.stage("ranks"):
            shared = share_metadata(storage_reader, ranks)

    @dcp_method_logger(**arguments)
    def local_step() -> LoadPlan:
        nonlocal metadata, has_global_metadata
        if share_reads.wrong is not None:
            raise share_reads.wrong
        if metadata is None:
            with report.stage("metadata"):
                metadata, has_global_metadata = _read_metadata(storage_reader, ranks.rank, shared)
        report.metadata_fallback_reason = why_metadata_is_slow(storage_reader, metadata)
        faster_method(planner, "set_up_planner")(state_dict, metadata, ranks.is_coordinator)
        if _takes_keywords(storage_reader.set_up_storage_reader):
            storage_reader.set_up_storage_reader(
                metadata, ranks.is_coordinator, rank=ranks.rank, use_collectives=has_global_metadata
            )
        else:
            storage_reader.set_up_storage_reader(metadata, ranks.is_coordinator)
        return storage_reader.prepare_local_plan(faster_method(planner, "create_local_plan")())

    @dcp_method_logger(**arguments)
    def global_step(plans: list[LoadPlan]) -> list[LoadPlan]:
        with interrupts.allowed():
            return storage_reader.prepare_global_plan(planner.create_global_plan(plans))

    @dcp_method_logger(**arguments)
    def read_data() -> None:
        with interrupts.allowed():
            final = planner.finish_plan(plan)
            with share_reads.offered():
                read_plan(storage_reader, final, planner).wait()

    local = Outcome(local_step)
    if local.error is None and not report.planned_natively:
        report.note_slow_planner(PLANS_ITSELF)
    # From here on no rank leaves the others without a word.
    with deferred_interrupt() as interrupts:
        if local.error is None:
            share_reads.look_at(storage_reader, metadata, has_global_metadata)
        with report.stage("ranks"):
            own_flag = 0 if _has_no_global_step(planner, storage_reader) else _GATHER_PLANS
            find_largest = partial(largest, ranks, dtype=torch.int32)
            flag, *words = _all_flags(ranks, "plan", local, find_largest, own_flag, share_reads.word)
            if flag & _FAILED:
                _raise_failures(ranks, "plan", local, alone=not has_global_metadata)
            share_reads.agree(*words)
            plan = local.value
            if flag & _GATHER_PLANS and has_global_metadata:
                plan = ranks.reduce_scatter("plan", lambda: local.value, global_step)
            elif flag & _GATHER_PLANS:
                plan = global_step([plan])[0]
        report.enter("commit")
        read = share_reads.read(read_data)
        if isinstance(read.error, GroupError):  # the others know as well, or wait for what will never come
            raise CheckpointException("read", {ranks.rank: wrap_exception(cast(Exception, read.error.__cause__))})
        with report.stage("ranks"):
            if _all_flags(ranks, "read", read, share_reads.largest)[0] & _FAILED:
                _raise_failures(ranks, "read", read, alone=not has_global_metadata)


def _all_flags(
    ranks: DistWrapper,
    step: str,
    outcome: Outcome[Any],
    find_largest: Callable[[Sequence[int]], list[int]],
    flag: int = 0,
    word: int = 0,
) -> tuple[int, int, int]:
    """The bits that any rank has set in its flag, and the lowest and the highest word of all ranks. Collective.

    Args:
        find_largest: returns for each number the largest that any rank has.
        flag: of this rank, but for ``_FAILED``, which the outcome tells.
        word: of this rank.
    """
    if outcome.error is not None:
        flag |= _FAILED
    if not ranks.use_dist:
        return flag, word, word
    try:
        # One number for each bit: the bitwise or is not what all backends have.
        numbers = [flag & _GATHER_PLANS, flag & _FAILED, -word, word]
        gather, failed, lowest, highest = find_largest(numbers)
        return gather | failed, -lowest, highest
    except Exception as error:
        if outcome.error is None and not isinstance(error, GroupError):
            raise
        failure = outcome.error or cast(Exception, error.__cause__)
        # A group without a backend for the host exchanges flags on the very device that failed. This rank can still say
        # what happened; the others wait until the group's time is up.
        raise CheckpointException(step, {ranks.rank: wrap_exception(failure)}) from error


def _raise_failures(ranks: DistWrapper, step: str, outcome: Outcome[Any], alone: bool) -> None:
    """Raise what went wrong on any rank. Collective.

    Args:
        alone: whether this rank raises its own error as it is, and not within CheckpointException.
    """
    # A rank that only could not go on without another one has no failure of its own.
    error = None if isinstance(outcome.error, OtherRankError) else outcome.error
    failures = get_failure_dict(ranks.all_gather_object(None if error is None else wrap_exception(sendable(error))))
    if error is not None and alone:
        raise error
    if error is not None:
        failures[ranks.rank] = wrap_exception(error)
    raise CheckpointException(step, failures)


def sendable(error: BaseException) -> BaseException:
    """The error itself; if it cannot be pickled, so that other ranks could not receive it, a LoadError of its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return LoadError(repr(error))
    return error


def _has_no_global_step(planner: LoadPlanner, reader: StorageReader) -> bool:
    """Whether planner and reader have torch's own global step, which returns all plans as they are."""
    for cls, name, default in _DEFAULT_STEPS:
        value: Any = reader if cls is StorageReader else planner
        # A wrapper that forwards every call to another object has no method of its own.
        if name in getattr(value, "__dict__", ()) or getattr(type(value), name, None) is not default:
            return False
    return True


def _read_metadata(reader: StorageReader, rank: int, shared: Callable[[], Metadata] | None) -> tuple[Metadata, bool]:
    """The metadata, and whether it is that of all ranks rather than what this rank saved on its own.

    Args:
        shared: what to call for the metadata of all ranks instead of the reader's ``read_metadata``, if anything.
    """
    errors = []
    try:
        metadata = metadata_of(reader) if shared is None else shared()
        if metadata:
            if isinstance(reader, QuantizedHuggingFaceStorageReader):
                with_dequantized_chunks(metadata)
            return metadata, True
    except Exception as error:
        errors.append(f"global metadata read failed: {error}")
        global_error: Exception | None = error
    else:
        global_error = None
    if _takes_keywords(reader.read_metadata):
        try:
            metadata = reader.read_metadata(rank=rank)
            if metadata is not None:
                logger.warning(
                    "the load uses what this rank saved on its own: %s", errors or "there is no global metadata"
                )
                return metadata, False
        except Exception as error:
            errors.append(f"rank local metadata read failed: {error}")
    # torch's type for whatever is wrong with metadata is AssertionError; ours tell more.
    reason = "; ".join(["metadata is None", *errors])
    if isinstance(global_error, OSError) and global_error.errno:
        path = str(global_error.filename or "")
        raise MetadataAccessError(reason, path, error_number=global_error.errno) from global_error
    if isinstance(global_error, LoadError):
        raise global_error
    raise AssertionError(reason) from global_error


def _path_of(reader: StorageReader) -> str:
    """The checkpoint that a reader reads, by what readers call it; empty if that does not tell."""
    named = (getattr(reader, name, None) for name in ("checkpoint_id", "path"))
    return next((str(path) for path in named if isinstance(path, (str, os.PathLike)) and str(path)), "")


def _takes_keywords(function: Callable[..., Any]) -> bool:
    # torch's own test: the catch-all must be called so.
    return "kwargs" in inspect.signature(function).parameters
