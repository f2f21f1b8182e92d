"""Loading the optimizer state that belongs to a sharded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader as torch_loader
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import _DistWrapper

from dcp_fast.errors import OptimizerStateError
from dcp_fast.garbage import paused_collection
from dcp_fast.optimizer.destinations import (
    RowSharding,
    like_parameter,
    slices_of_parameters,
)
from dcp_fast.optimizer.sliced import SlicedShardedTensor
from dcp_fast.planner import DefaultLoadPlanner, global_size

__all__ = ["load_sharded_optimizer_state_dict"]

# A key of the flattened optimizer state, as its path in the nested one: ("optim", "state", FQN, "exp_avg").
_Path = tuple[Any, ...]


@paused_collection()
def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
    *,
    like: Literal["model"] | None = None,
) -> dict[str, Any]:
    """Drop-in for ``torch.distributed.checkpoint.load_sharded_optimizer_state_dict``.

    Every rank allocates and reads only what it keeps, and reads the metadata once. All ranks of the default process
    group must call it.

    Args:
        model_state_dict: of an FSDP model, under ``SHARDED_STATE_DICT``: it tells how parameters are sharded. In the
            2-D layout (FSDP + TP, nested ShardedTensors) the offsets and sizes of this rank's tensor-parallel slices
            are taken from it.
        optimizer_key: the key of the optimizer's state dict in the state dict that was saved.
        storage_reader: as in :func:`dcp_fast.load`, such as :class:`dcp_fast.FileSystemReader`.
        planner: as in :func:`dcp_fast.load`. It plans for a flat state dict of the optimizer's tensors, also in the 2-D
            layout (where torch's function does not use it): there a tensor-parallel state is a tensor of the whole
            stored size, with the chunks that this rank needs of it (``__create_chunk_list__``), so that indices in
            the plan and in the planner's hooks are those of the stored tensor. The tensors that the hooks resolve
            are the shards themselves.
        like: None returns what torch's function returns: ShardedTensors in equal chunks of rows over all ranks, or in
            the 2-D layout over the data-parallel ranks, whichever these are. ``"model"`` returns each state tensor
            with the sharding of its parameter: a DTensor with its mesh and placements for a DTensor, a ShardedTensor
            with its shards for a ShardedTensor. Use it for models whose state dict has DTensors (FSDP2, FSDP on a
            device mesh, HSDP, FSDP2 + TP), and for FSDP on process groups of some ranks; a rank without a model passes
            an empty state dict and gets no state of parameters. State that is neither of its parameter's size nor a
            single element (factored state, for one) is an error: how it was sharded is not stored. A nested
            ShardedTensor's state is sharded as without it.

    Returns:
        ``{optimizer_key: the nested optimizer state dict}``. Tensors of one element are plain tensors.

    Raises:
        OptimizerStateError: the key or the paths of nested keys are not in the checkpoint, or the state does not fit
            the model. A parameter without state is no error, and without ``like="model"`` neither is state without a
            parameter. Whatever the storage reader raises for the metadata is raised as it is.
        CheckpointException: on every rank, if any rank failed later; and on the ranks that did not fail themselves if
            another one failed before.
    """
    no_dist = not dist.is_initialized()
    prepared: tuple[Metadata, dict[str, Any]] | None = None
    error: Exception | None = None

    def prepare() -> None:
        nonlocal prepared, error
        try:
            storage_reader.reset()
            metadata = storage_reader.read_metadata()
            prepared = metadata, _destinations(model_state_dict, optimizer_key, metadata, like)
        except Exception as caught:
            error = caught
            raise

    try:
        # A rank that failed alone must not leave the others waiting for it in the collective calls of the load.
        _DistWrapper(None, not no_dist, 0).all_gather("prepare", prepare)
    except CheckpointException:
        if error is None:
            raise
    if error is not None:
        raise error
    assert prepared is not None
    metadata, state_dict = prepared
    torch_loader._load_state_dict(
        state_dict,
        cast(StorageReader, _MetadataReadBefore(storage_reader, metadata)),
        no_dist=no_dist,
        planner=DefaultLoadPlanner() if planner is None else planner,
    )
    for key, value in state_dict.items():
        if isinstance(value, SlicedShardedTensor):
            state_dict[key] = value.sharded
    return unflatten_state_dict(state_dict, cast(Any, metadata.planner_data))


class _MetadataReadBefore:
    """A storage reader whose metadata is already known; all else is the reader's own."""

    def __init__(self, reader: StorageReader, metadata: Metadata) -> None:
        self._reader = reader
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def _destinations(
    model_state_dict: Mapping[str, Any], optimizer_key: str, metadata: Metadata, like: Literal["model"] | None
) -> dict[str, Any]:
    """The flat state dict to load into: a tensor, or a placeholder for a bytes entry, for each key of the optimizer."""
    if like not in (None, "model"):
        raise ValueError(f'like must be None or "model", got {like!r}')
    entries = _entries(metadata, optimizer_key)
    slices = slices_of_parameters(model_state_dict)
    # As in torch: state of parameters without a slice is sharded over the data-parallel ranks of those that have one.
    shardings = {part.group: RowSharding(part.group) for part in slices.values()}
    by_rows = next(reversed(shardings.values())) if shardings else RowSharding(None)
    state_dict: dict[str, Any] = {}
    strangers = set()
    for key, (path, entry) in entries.items():
        if isinstance(entry, BytesStorageMetadata):
            state_dict[key] = "<bytes_io>"
            continue
        fqn, name = _parameter_of(path)
        if like == "model" and fqn is not None and fqn not in slices:
            if fqn in model_state_dict:
                state_dict[key] = _like_model(key, entry, name, model_state_dict[fqn], by_rows)
            elif model_state_dict:  # else this rank has no model, and needs no state
                strangers.add(fqn)
        elif entry.size.numel() == 1 or (like == "model" and fqn is None):
            state_dict[key] = by_rows.whole(entry)
        else:
            part = slices.get(fqn) if fqn is not None else None
            if slices and fqn is not None:
                _check_size(key, entry, model_state_dict.get(fqn))
            state_dict[key] = by_rows.sharded(entry) if part is None else shardings[part.group].sharded(entry, part)
    if strangers:
        raise OptimizerStateError(
            f"the checkpoint has optimizer state of {len(strangers)} parameters that the model's state dict lacks, so "
            f"that their sharding cannot be told: {_listed(strangers)}"
        )
    return state_dict


def _entries(metadata: Metadata, optimizer_key: str) -> dict[str, tuple[_Path, STORAGE_TYPES]]:
    paths = metadata.planner_data
    if not isinstance(paths, Mapping):
        raise OptimizerStateError(
            "the checkpoint does not say how its keys were nested (no planner data), so that the optimizer's cannot be "
            "told; it must be saved by a planner that flattens the state dict, such as DefaultSavePlanner"
        )
    entries = {}
    keys = set()
    for key, entry in metadata.state_dict_metadata.items():
        if key not in paths:
            raise OptimizerStateError("the planner data of the checkpoint lacks a key", fqn=key)
        path = paths[key]
        keys.add(path[0])
        if path[0] == optimizer_key:
            entries[key] = path, entry
    if not entries:
        raise OptimizerStateError(f"the checkpoint has no key {optimizer_key!r}; it has {_listed(keys)}")
    return entries


def _parameter_of(path: _Path) -> tuple[str | None, str]:
    """The FQN of the parameter that a state belongs to, None if it belongs to none, and the name of the state."""
    if len(path) > 3 and path[1] == "state":
        return str(path[2]), str(path[-1])
    # get_optimizer_state_dict with flatten_optimizer_state_dict: ("optim", "state.FQN.exp_avg").
    if len(path) == 2 and str(path[1]).startswith("state."):
        fqn, _, name = str(path[1]).removeprefix("state.").rpartition(".")
        return fqn, name
    return None, str(path[-1])


def _like_model(
    key: str, entry: TensorStorageMetadata, name: str, parameter: Any, by_rows: RowSharding
) -> torch.Tensor:
    # Optimizers of torch count steps in a plain tensor of no dimensions, also for a parameter of none.
    is_step = name == "step" and not entry.size
    if isinstance(parameter, torch.Tensor) and entry.size == global_size(parameter) and not is_step:
        return like_parameter(entry, parameter)
    if entry.size.numel() == 1:
        return by_rows.whole(entry)
    _check_size(key, entry, parameter)
    raise OptimizerStateError(f"state of a {type(parameter).__name__}, which has no sharding", fqn=key)


def _check_size(key: str, entry: TensorStorageMetadata, parameter: Any) -> None:
    if isinstance(parameter, torch.Tensor) and entry.size != global_size(parameter):
        reason = f"Size mismatch between saved {entry.size} and current: {global_size(parameter)} for {key}"
        raise OptimizerStateError(reason, fqn=key)


def _listed(names: set[Any]) -> str:
    shown = sorted(map(repr, names))
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
