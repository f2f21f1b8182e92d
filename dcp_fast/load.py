"""Entry points with the signatures of torch.distributed.checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from dcp_fast._torch import api_bc_check, dcp_method_logger, storage_setup
from dcp_fast.collector import paused_collection
from dcp_fast.observe.report import reported
from dcp_fast.planning.planner import DefaultLoadPlanner
from dcp_fast.ranks.steps import load_on_all_ranks
from dcp_fast.readers.filesystem import FileSystemReader
from dcp_fast.readers.others import fast_twin
from dcp_fast.readers.proof import has_torchs_read_data

__all__ = ["is_stateful", "load", "load_state_dict", "load_state_dict_on_all_ranks"]


@dcp_method_logger(log_exceptions=True)
@api_bc_check  # type: ignore[untyped-decorator]
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    trace: str | os.PathLike[str] | None = None,
    share_metadata: bool = False,
    trust_metadata: bool | None = None,
    trust_bytes: bool | None = None,
) -> None:
    """Drop-in for ``torch.distributed.checkpoint.load``: same arguments, same result, same exceptions.

    A local ``checkpoint_id`` (a path, ``file://`` or ``local://``) is read by :class:`dcp_fast.FileSystemReader`, any
    other by the reader that torch chooses. The default planner is :class:`dcp_fast.DefaultLoadPlanner`. A reader or
    planner that is passed is used as it is, but where a reader reads data just as torch's FileSystemReader does, from
    local files, the native engine does it instead. The report of the load tells (:func:`dcp_fast.last_report`).

    torch's function lacks these arguments:

    ``trace`` and ``trust_metadata`` are arguments of :class:`dcp_fast.FileSystemReader`, and ``trust_bytes`` is one of
    :class:`dcp_fast.DefaultLoadPlanner`. They hold for this load, also if reader and planner are passed. None: as the
    reader or planner was told.

    ``share_metadata``, which must be the same on all ranks: whether the first rank of the process group reads
    ``.metadata`` for all, and the others receive its bytes, which each rank parses. Storage is then asked for the file
    once rather than by every rank or node, which pays where many nodes load from storage that they share. It is not the
    default because ranks of one machine, whose page cache they share already, read the file in less time than it takes
    to send it around (see the benchmarks), and because it takes one more collective call, of 56 bytes. Ranks read their
    own all the same where they see different files, if the file is smaller than 1 MiB, if it cannot be parsed natively,
    if a rank trusts metadata, or if its reader is not ours.

    Raises:
        ValueError: one of these was given, but another reader or planner than ours is to be used.
        CheckpointException: on every rank if any rank failed; ``failures`` maps ranks to their errors, which for
            damaged checkpoints are of the classes in :mod:`dcp_fast.errors`.
    """
    no_dist = no_dist or not dist.is_available() or not dist.is_initialized()
    if no_dist:
        warnings.warn(
            "torch.distributed is disabled, unavailable or uninitialized, "
            "assuming the intent is to load in a single process.",
            stacklevel=3,
        )
    reader = cast(StorageReader, storage_setup(storage_reader, checkpoint_id, reader=True))
    if storage_reader is None and checkpoint_id is not None:
        reader = _reader_of_ours(reader, checkpoint_id)
    if planner is None:
        planner = DefaultLoadPlanner()
    options: list[tuple[object, str, Any]] = []
    for owner, cls, name, given in (
        (reader, FileSystemReader, "trace", None if trace is None else os.fsdecode(trace)),
        (reader, FileSystemReader, "trust_metadata", trust_metadata),
        (planner, DefaultLoadPlanner, "trust_bytes", trust_bytes),
    ):
        if given is not None:
            if not isinstance(owner, cls):
                raise ValueError(f"{name} needs a dcp_fast.{cls.__name__}, got a {type(owner).__name__}")
            options.append((owner, name, given))

    with reported():
        # All ranks load in the same order of keys. A Stateful's own state dict is loaded in place of it. What a
        # Stateful removes from the state dict meanwhile is skipped, as in torch.
        keys = sorted(state_dict)
        loaded: dict[str, Any] = {}
        for key in keys:
            if key in state_dict:
                value = state_dict[key]
                loaded[key] = value.state_dict() if is_stateful(value) else value
        # Metadata, plan and columns are gone before the collector looks at them.
        with paused_collection(), _set(options):
            load_on_all_ranks(loaded, reader, planner, process_group, no_dist=no_dist, share=share_metadata)
        for key in keys:
            if key in state_dict:
                value = state_dict[key]
                if is_stateful(value):
                    value.load_state_dict(loaded[key])
                else:
                    state_dict[key] = loaded[key]


def _reader_of_ours(reader: StorageReader, checkpoint_id: str | os.PathLike[str]) -> StorageReader:
    """The reader that torch chose for a checkpoint, or ours in its place if the checkpoint is local."""
    if type(reader) is torch_filesystem.FileSystemReader:
        return FileSystemReader(checkpoint_id)
    twin = fast_twin(reader) if has_torchs_read_data(reader) else None
    return twin if isinstance(twin, FileSystemReader) else reader


@contextmanager
def _set(options: list[tuple[object, str, Any]]) -> Iterator[None]:
    """Set attributes, given as owner, name and value, and put back at the end what they were."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in options]
    for owner, name, value in options:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def is_stateful(value: object) -> bool:
    """Whether a value has a state dict of its own."""
    # The check of a runtime protocol takes microseconds, which most values, being tensors, need not pay.
    return type(value) is not torch.Tensor and isinstance(value, Stateful)


@deprecated(
    "`load_state_dict` is deprecated and will be removed in future versions. Please use `load` instead.",
    category=FutureWarning,
)
def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Drop-in for ``torch.distributed.checkpoint.load_state_dict``, which torch deprecates in favour of ``load``.

    Reader and planner say what they trust; the default planner is ``dcp_fast.DefaultLoadPlanner()``.
    """
    storage_reader.reset()
    load_state_dict_on_all_ranks(state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner)


def load_state_dict_on_all_ranks(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """What torch's functions call to load a state dict, once reader and planner are there."""
    with reported(), paused_collection():
        load_on_all_ranks(
            state_dict,
            storage_reader,
            DefaultLoadPlanner() if planner is None else planner,
            process_group,
            coordinator_rank,
            no_dist,
        )
