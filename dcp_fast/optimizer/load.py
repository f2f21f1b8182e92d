"""Loading the optimizer state that belongs to a sharded model.

All ranks take these steps together. A rank that fails in one tells the others, so that none waits for it in the next:

1. Each rank reads the metadata, and finds its slices of tensor-parallel parameters in the model's state dict.
2. If any rank has slices and another one may lack them, ranks tell each other which parameters are tensor-parallel.
3. Each rank allocates the tensors to load into: state_tensors.py.
4. These tensors are loaded as any other state dict is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader

from dcp_fast._torch import DistWrapper, unflatten_state_dict
from dcp_fast.collector import paused_collection
from dcp_fast.observe.report import reported
from dcp_fast.optimizer.sharding import ParameterSlice, may_lack_slices, slices_of_parameters
from dcp_fast.optimizer.sliced import SlicedShardedTensor
from dcp_fast.optimizer.state_tensors import StateTensors, optimizer_entries
from dcp_fast.planning.planner import DefaultLoadPlanner
from dcp_fast.ranks.steps import load_on_all_ranks, sendable
from dcp_fast.readers.others import metadata_of

Kept = TypeVar("Kept")
Told = TypeVar("Told")


@reported()
@paused_collection()
def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
    *,
    like: Literal["model"] | None = None,
    share_reads: bool | None = None,
) -> dict[str, Any]:
    """Drop-in for ``torch.distributed.checkpoint.load_sharded_optimizer_state_dict``.

    Every rank allocates only what it keeps, and reads the metadata once. All ranks of the default process group must
    call it.

    Args:
        model_state_dict: of an FSDP model, under ``SHARDED_STATE_DICT``: it tells how parameters are sharded. In the
            2-D layout (FSDP + TP, nested ShardedTensors) the offsets and sizes of this rank's tensor-parallel slices
            are taken from it.
        optimizer_key: the key of the optimizer's state dict in the state dict that was saved.
        storage_reader: as in :func:`dcp_fast.load`, such as :class:`dcp_fast.FileSystemReader`.
        planner: as in :func:`dcp_fast.load`, such as ``DefaultLoadPlanner(trust_bytes=True)`` for optimizer state that
            is to be unpickled as torch does. It plans for a flat state dict of the optimizer's tensors, also in the 2-D
            layout (where torch's function does not use it): there a tensor-parallel state is a tensor of the whole
            stored size, with the chunks that this rank needs of it (``__create_chunk_list__``), so that indices in
            the plan and in the planner's hooks are those of the stored tensor. The tensors that the hooks resolve
            are the shards themselves.
        like: None returns what torch's function returns: ShardedTensors in equal chunks of rows over all ranks, or in
            the 2-D layout over the data-parallel ranks, whichever these are. ``"model"`` returns each state tensor
            with the sharding of its parameter: a DTensor with its mesh and placements for a DTensor, a ShardedTensor
            with its shards for a ShardedTensor. Use it for models whose state dict has DTensors (FSDP2, FSDP on a
            device mesh, HSDP, FSDP2 + TP), and for FSDP on process groups of some ranks; a rank without a model passes
            an empty state dict and gets no state of parameters. The parameter is the first part of a state's path that
            is an FQN of the model. A tensor whose path has none is loaded whole on every rank. State of a parameter
            that the model lacks is an error that names it, or left out if the planner has ``allow_partial_load``. So
            is state that is neither of its parameter's size nor a single element (factored state, for one): how it was
            sharded is not stored. A nested ShardedTensor's state is sharded as without ``like``.
        share_reads: as of :func:`dcp_fast.load`.

    Returns:
        ``{optimizer_key: the nested optimizer state dict}``. Without ``like``, tensors of one element are plain.

    Raises:
        OptimizerStateError: the key or the paths of nested keys are not in the checkpoint, parts of a state tensor are
            not, or the state does not fit the model. A parameter without state is no error, and without
            ``like="model"`` neither is state without a parameter. Whatever the storage reader raises for the metadata
            is raised as it is.
        CheckpointException: on every rank, if any rank failed later; and on the ranks that did not fail themselves if
            another one failed before.
    """
    planner = DefaultLoadPlanner() if planner is None else planner
    found, of_ranks = _on_all_ranks("read metadata", lambda: _find(model_state_dict, storage_reader, like))
    tensor_parallel: set[str] = set()
    if any(has_slices for has_slices, _ in of_ranks):
        tensor_parallel = set(found.slices)
        if any(may_lack for _, may_lack in of_ranks):
            _, fqns_of_ranks = _on_all_ranks("find slices", lambda: (None, list(found.slices)))
            tensor_parallel.update(*fqns_of_ranks)

    def allocate() -> tuple[dict[str, Any], None]:
        is_partial = bool(getattr(planner, "allow_partial_load", False))
        tensors = StateTensors(model_state_dict, like, found.slices, tensor_parallel, is_partial)
        return tensors.allocate(optimizer_entries(found.metadata, optimizer_key)), None

    state_dict, _ = _on_all_ranks("allocate", allocate)
    load_on_all_ranks(
        state_dict,
        storage_reader,
        planner,
        no_dist=not dist.is_initialized(),
        metadata=found.metadata,
        share_reads=share_reads,
    )
    for key, value in state_dict.items():
        if isinstance(value, SlicedShardedTensor):
            state_dict[key] = value.sharded
    return unflatten_state_dict(state_dict, cast(Any, found.metadata.planner_data))


@dataclass(frozen=True)
class _Found:
    """What a rank finds on its own.

    Attributes:
        metadata: of the checkpoint.
        slices: of this rank, by the FQN of the parameter.
    """

    metadata: Metadata
    slices: dict[str, ParameterSlice]


def _find(
    model_state_dict: dict[str, Any], storage_reader: StorageReader, like: str | None
) -> tuple[_Found, tuple[bool, bool]]:
    """What this rank finds; and for the other ranks, whether it has slices, and whether it may lack some."""
    if like not in (None, "model"):
        raise ValueError(f'like must be None or "model", got {like!r}')
    storage_reader.reset()
    found = _Found(metadata_of(storage_reader), slices_of_parameters(model_state_dict))
    return found, (bool(found.slices), may_lack_slices(model_state_dict, found.slices))


def _on_all_ranks(step: str, function: Callable[[], tuple[Kept, Told]]) -> tuple[Kept, list[Told]]:
    """Call a function on each rank.

    Args:
        step: named in the errors.
        function: returns what this rank keeps, and what it tells the other ranks.

    Returns:
        What this rank keeps, and what all ranks tell.

    Raises:
        Exception: on a rank where the function fails, what it raises there; on all others a CheckpointException.
    """
    kept: list[Kept] = []
    error: Exception | None = None

    def call() -> Told:
        nonlocal error
        try:
            mine, told = function()
        except Exception as caught:
            error = caught
            raise sendable(caught) from None
        kept.append(mine)
        return told

    try:
        told = DistWrapper(None, dist.is_initialized(), 0).all_gather(step, call)
    except CheckpointException:
        if error is None:
            raise
        raise error from None
    return kept[0], told
