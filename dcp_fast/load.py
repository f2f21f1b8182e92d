"""Entry points with the signatures of torch.distributed.checkpoint."""

from __future__ import annotations

import os
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from typing_extensions import deprecated

from dcp_fast._torch import api_bc_check, dcp_method_logger, storage_setup
from dcp_fast.collector import paused_collection
from dcp_fast.metadata.safetensors import holds_safetensors
from dcp_fast.observe.report import reported
from dcp_fast.planning.planner import DefaultLoadPlanner
from dcp_fast.ranks.exchange import EXCHANGE_BYTES, check_sharing
from dcp_fast.ranks.steps import load_on_all_ranks
from dcp_fast.readers.engine_reader import EngineReader
from dcp_fast.readers.filesystem import FileSystemReader
from dcp_fast.readers.huggingface import HuggingFaceStorageReader
from dcp_fast.readers.others import fast_twin
from dcp_fast.readers.proof import has_torchs_read_data

_NO_STATEFULS = frozenset(
    {torch.Tensor, torch.nn.Parameter, DTensor, type(None), bool, int, float, str, bytes, tuple, list, dict}
)


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
    share_reads: bool | None = None,
    exchange_bytes: int = EXCHANGE_BYTES,
    trust_metadata: bool | None = None,
    trust_bytes: bool | None = None,
) -> None:
    """Drop-in for ``torch.distributed.checkpoint.load``: same arguments, same result, same exceptions.

    A local ``checkpoint_id`` (a path, ``file://`` or ``local://``) is read by :class:`dcp_fast.FileSystemReader`, or by
    :class:`dcp_fast.HuggingFaceStorageReader` where it is a directory that has ``.safetensors`` files and no
    ``.metadata``; any other by the reader that torch chooses. The default planner is
    :class:`dcp_fast.DefaultLoadPlanner`. A reader or planner that is passed is used as it is, but where a reader reads
    data just as torch's of that name does, from local files, the native engine does it instead. The report of the load
    tells (:func:`dcp_fast.last_report`).

    torch's function lacks the last six arguments. ``None`` means: as the reader or planner was told. The options of
    this load change neither of these objects. So loads in several threads may share a reader, each with options of its
    own. A planner holds the state dict that it loads, so each load needs a planner of its own.

    Args:
        state_dict, checkpoint_id, storage_reader, planner, process_group, no_dist: as torch's.
        trace: a file for the timeline of this load, as of :class:`dcp_fast.FileSystemReader`.
        share_metadata: whether the first rank of the process group reads ``.metadata`` and sends its bytes to the other
            ranks, each of which parses them. Must be the same on all ranks. Storage is then asked for the file once,
            rather than by every rank or node, which pays where many nodes load from storage that they share. On one
            machine it does not pay: ranks share the page cache, and read the file in less time than it takes to send
            it (docs/benchmarks.md). It costs one more collective call, of 56 bytes. Each rank reads the file itself, as
            without this option, if ranks see different files, if the file is smaller than 1 MiB, if the native parser
            does not know it, if a rank trusts metadata, or if a rank's reader is not ours.
        share_reads: whether each byte is read by one of the ranks that need it, and sent to the others. Must be the
            same on all ranks. None: as :func:`dcp_fast.install` was told, else False. It pays where storage that all
            ranks share is slower than the network between them (docs/sharing.md). Where ranks cannot share, each reads
            what it needs, and the report of the load tells why (``sharing_fallback_reason``).
        exchange_bytes: memory for what this rank sends to others and receives from them, at least 1 MiB. The smallest
            of all ranks holds.
        trust_metadata: unpickle ``.metadata`` as torch does, as of :class:`dcp_fast.FileSystemReader`.
        trust_bytes: unpickle bytes entries as torch does, as of :class:`dcp_fast.DefaultLoadPlanner`.

    Raises:
        ValueError: ``trace``, ``trust_metadata`` or ``trust_bytes`` was given, but the reader or planner that it is for
            is not dcp_fast's; ``share_reads`` differs between ranks; without a process group, ``exchange_bytes`` is too
            small or too large.
        TypeError: without a process group, ``share_reads`` or ``exchange_bytes`` is of another type.
        CheckpointException: on every rank if any rank failed, these two arguments included. ``failures`` maps ranks to
            their errors, which for damaged checkpoints are of the classes in :mod:`dcp_fast.errors`.
    """
    no_dist = no_dist or not dist.is_available() or not dist.is_initialized()
    if no_dist:
        warnings.warn(
            "torch.distributed is disabled, unavailable or uninitialized, "
            "assuming the intent is to load in a single process.",
            stacklevel=3,
        )
        check_sharing(share_reads, exchange_bytes)
    reader = cast(StorageReader, storage_setup(storage_reader, checkpoint_id, reader=True))
    if storage_reader is None and checkpoint_id is not None:
        reader = _reader_of_ours(reader, checkpoint_id)
    if planner is None:
        planner = DefaultLoadPlanner()
    options: list[tuple[object, str, Any]] = []
    for owner, cls, public, name, given in (
        (reader, EngineReader, "FileSystemReader", "trace", None if trace is None else os.fsdecode(trace)),
        (reader, FileSystemReader, "FileSystemReader", "trust_metadata", trust_metadata),
        (planner, DefaultLoadPlanner, "DefaultLoadPlanner", "trust_bytes", trust_bytes),
    ):
        if given is not None:
            if not isinstance(owner, cls):
                raise ValueError(f"{name} needs a dcp_fast.{public}, got a {type(owner).__name__}")
            options.append((owner, name, given))

    with reported(options):
        # All ranks load in the same order of keys. A Stateful is replaced by its own state dict. It may remove keys
        # from `state_dict` when it is asked for that. Such keys are skipped, as in torch.
        keys = sorted(state_dict.keys())  # torch's error for what is no dict
        loaded: dict[str, Any] = {}
        for key in keys:
            if key in state_dict:
                value = state_dict[key]
                loaded[key] = value.state_dict() if is_stateful(value) else value
        # Without a pause the collector would walk through metadata and plan, which are gone at the end of the load.
        with paused_collection():
            load_on_all_ranks(
                loaded,
                reader,
                planner,
                process_group,
                no_dist=no_dist,
                share=share_metadata,
                share_reads=share_reads,
                exchange_bytes=exchange_bytes,
            )
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
        ours: StorageReader | str = FileSystemReader(checkpoint_id)
    else:
        ours = fast_twin(reader) if has_torchs_read_data(reader) else ""
    if not isinstance(ours, FileSystemReader):
        return reader
    return HuggingFaceStorageReader(ours.path) if holds_safetensors(ours.path) else ours


def is_stateful(value: object) -> bool:
    """Whether a value has a state dict of its own."""
    # To check for a runtime protocol takes microseconds. Most values are tensors and need no check.
    return type(value) not in _NO_STATEFULS and isinstance(value, Stateful)


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
