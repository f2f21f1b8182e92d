"""Entry points with the signatures of torch.distributed.checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint import state_dict_loader as torch_loader
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import _api_bc_check
from typing_extensions import deprecated

from dcp_fast.planner import DefaultLoadPlanner
from dcp_fast.readers import FileSystemReader

__all__ = ["load", "load_state_dict"]

# Bound at import: `install` may put the function below in the place of torch's.
_torch_load = torch_loader.load
_TorchFileSystemReader = torch_filesystem.FileSystemReader


@_api_bc_check  # type: ignore[untyped-decorator]
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Drop-in for ``torch.distributed.checkpoint.load``: same arguments, same result, same exceptions.

    A local ``checkpoint_id`` is read by :class:`dcp_fast.FileSystemReader`, any other by the reader that torch chooses.
    The default planner is :class:`dcp_fast.DefaultLoadPlanner`. A reader or planner that is passed is used as it is.

    Raises:
        CheckpointException: on every rank if any rank failed; ``failures`` maps ranks to their errors, which for
            damaged checkpoints are of the classes in :mod:`dcp_fast.errors`.
    """
    if storage_reader is None and checkpoint_id is not None:
        storage_reader = _reader_for(checkpoint_id)
    _torch_load(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_reader=storage_reader,
        planner=DefaultLoadPlanner() if planner is None else planner,
        process_group=process_group,
        no_dist=no_dist,
    )


def _reader_for(checkpoint_id: str | os.PathLike[str]) -> StorageReader | None:
    if not checkpoint_id:
        return None  # torch has its own error for it
    reader = _storage_setup(None, checkpoint_id, reader=True)
    assert isinstance(reader, StorageReader)
    return FileSystemReader(checkpoint_id) if type(reader) is _TorchFileSystemReader else reader


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
    """Drop-in for ``torch.distributed.checkpoint.load_state_dict``, which torch deprecates in favour of ``load``."""
    storage_reader.reset()
    torch_loader._load_state_dict(
        state_dict,
        storage_reader,
        process_group,
        coordinator_rank,
        no_dist,
        DefaultLoadPlanner() if planner is None else planner,
    )
