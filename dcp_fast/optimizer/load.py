"""Loading the optimizer state that belongs to a sharded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader

from dcp_fast._torch import DistWrapper, unflatten_state_dict
from dcp_fast.collector import paused_collection
from dcp_fast.errors import OptimizerStateError
from dcp_fast.observe.report import reported
from dcp_fast.optimizer.sharding import (
    ParameterSlice,
    RowSharding,
    data_parallel_group,
    empty_slices,
    like_parameter,
    may_lack_slices,
    slices_of_parameters,
)
from dcp_fast.optimizer.sliced import SlicedShardedTensor
from dcp_fast.planning.planner import DefaultLoadPlanner
from dcp_fast.planning.search import global_size
from dcp_fast.ranks.steps import load_on_all_ranks, sendable

__all__ = ["load_sharded_optimizer_state_dict"]

# A key of the flattened optimizer state, as its path in the nested one: ("optim", "state", FQN, "exp_avg").
_Path = tuple[Any, ...]

# State that torch's optimizers keep in a plain tensor of no dimensions, also for a parameter of none.
_COUNTERS = ("step", "mu_product", "eta", "mu")

T = TypeVar("T")


@reported()
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
    metadata, slices = None, {}

    def look() -> tuple[bool, bool]:
        nonlocal metadata, slices
        if like not in (None, "model"):
            raise ValueError(f'like must be None or "model", got {like!r}')
        storage_reader.reset()
        metadata = storage_reader.read_metadata()
        slices = slices_of_parameters(model_state_dict)
        return bool(slices), may_lack_slices(model_state_dict, slices)

    state_dict: dict[str, Any] = {}
    looks = _on_all_ranks("read metadata", look)
    assert metadata is not None
    tensor_parallel: set[str] = set()
    if any(has_slices for has_slices, _ in looks):
        tensor_parallel = set(slices)
        if any(lacks for _, lacks in looks):
            tensor_parallel.update(*_on_all_ranks("find slices", lambda: list(slices)))

    def allocate() -> None:
        destinations = _Destinations(model_state_dict, like, slices, tensor_parallel, planner)
        state_dict.update(destinations.of(_entries(metadata, optimizer_key)))

    _on_all_ranks("allocate", allocate)
    load_on_all_ranks(
        state_dict,
        storage_reader,
        DefaultLoadPlanner() if planner is None else planner,
        no_dist=not dist.is_initialized(),
        metadata=metadata,
    )
    for key, value in state_dict.items():
        if isinstance(value, SlicedShardedTensor):
            state_dict[key] = value.sharded
    return unflatten_state_dict(state_dict, cast(Any, metadata.planner_data))


def _on_all_ranks(step: str, function: Callable[[], T]) -> list[T]:
    """What a function returns on each rank.

    A rank that fails alone must not leave the others waiting for it in the collective calls of the load: it raises its
    own error, the others a CheckpointException.
    """
    error: Exception | None = None

    def call() -> T:
        nonlocal error
        try:
            return function()
        except Exception as caught:
            error = caught
            raise sendable(caught) from None

    try:
        return DistWrapper(None, dist.is_initialized(), 0).all_gather(step, call)
    except CheckpointException:
        if error is None:
            raise
        raise error from None


class _Destinations:
    """Makes the flat state dict to load into: a tensor, or a placeholder for a bytes entry, for each key.

    Args:
        model_state_dict, like, planner: of load_sharded_optimizer_state_dict.
        slices: of this rank's parameters.
        tensor_parallel: FQNs of the parameters of which any rank has a slice.
    """

    def __init__(
        self,
        model_state_dict: Mapping[str, Any],
        like: Literal["model"] | None,
        slices: Mapping[str, ParameterSlice],
        tensor_parallel: Collection[str],
        planner: LoadPlanner | None,
    ) -> None:
        self._model = model_state_dict
        self._like = like
        self._partial = bool(getattr(planner, "allow_partial_load", False))
        group = data_parallel_group(model_state_dict, slices, tensor_parallel)
        self._slices = {**slices, **empty_slices(model_state_dict, tensor_parallel, group)}
        self._rows = RowSharding(group)
        self._rows_of_slices = {each: RowSharding(each) for each in {part.group for part in self._slices.values()}}

    def of(self, entries: Mapping[str, tuple[_Path, STORAGE_TYPES]]) -> dict[str, Any]:
        state_dict: dict[str, Any] = {}
        strangers = set()
        for key, (path, entry) in entries.items():
            if isinstance(entry, BytesStorageMetadata):
                state_dict[key] = "<bytes_io>"
                continue
            fqn = self._parameter_of(path)
            if self._like == "model" and fqn is not None and fqn not in self._slices:
                if fqn in self._model:
                    state_dict[key] = self._like_model(key, path, entry, self._model[fqn])
                elif self._model:  # else this rank has no model, and needs no state
                    strangers.add(fqn)
            elif entry.size.numel() == 1 or (self._like == "model" and fqn is None):
                state_dict[key] = self._rows.whole(entry)
            else:
                state_dict[key] = self._by_rows(key, entry, fqn)
        if strangers and not self._partial:
            raise OptimizerStateError(
                f"the checkpoint has optimizer state of {len(strangers)} parameters that the model's state dict lacks, "
                f"so that their sharding cannot be told: {_listed(strangers)}; a planner with allow_partial_load "
                "leaves them out"
            )
        return state_dict

    def _parameter_of(self, path: _Path) -> str | None:
        """The FQN of the parameter that a state belongs to; None if it belongs to none."""
        if self._like is None:
            return str(path[2]) if len(path) > 2 else None  # torch's rule, for tensor-parallel parameters
        # get_optimizer_state_dict with flatten_optimizer_state_dict: ("optim", "state.FQN.exp_avg").
        if len(path) == 2 and str(path[1]).startswith("state."):
            return str(path[1]).removeprefix("state.").rpartition(".")[0]
        for part in path[1:]:
            if isinstance(part, str) and part in self._model:
                return part
        after = path.index("state") + 1 if "state" in path else len(path)
        return str(path[after]) if after < len(path) - 1 else None

    def _like_model(self, key: str, path: _Path, entry: TensorStorageMetadata, parameter: Any) -> torch.Tensor:
        name = str(path[-1]).rpartition(".")[2]
        is_counter = name in _COUNTERS and not entry.size
        if isinstance(parameter, torch.Tensor) and entry.size == global_size(parameter) and not is_counter:
            return like_parameter(entry, parameter)
        if entry.size.numel() == 1:
            return self._rows.whole(entry)
        _check_size(key, entry, parameter)
        raise OptimizerStateError(f"state of a {type(parameter).__name__}, which has no sharding", fqn=key)

    def _by_rows(self, key: str, entry: TensorStorageMetadata, fqn: str | None) -> torch.Tensor:
        if self._slices and fqn is not None:
            _check_size(key, entry, self._model.get(fqn))
        part = self._slices.get(fqn) if fqn is not None else None
        return self._rows.sharded(entry) if part is None else self._rows_of_slices[part.group].sharded(entry, part)


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
            _check_complete(key, entry)
            entries[key] = path, entry
    if not entries:
        raise OptimizerStateError(f"the checkpoint has no key {optimizer_key!r}; it has {_listed(keys)}")
    return entries


def _check_complete(key: str, entry: STORAGE_TYPES) -> None:
    """Raise if parts of a tensor are stored nowhere: the memory that they would be left in was never written."""
    if isinstance(entry, TensorStorageMetadata):
        stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if stored < math.prod(entry.size):
            reason = f"the checkpoint has only {stored} of the {math.prod(entry.size)} elements of a state tensor"
            raise OptimizerStateError(reason, fqn=key)


def _check_size(key: str, entry: TensorStorageMetadata, parameter: Any) -> None:
    if isinstance(parameter, torch.Tensor) and entry.size != global_size(parameter):
        reason = f"Size mismatch between saved {entry.size} and current: {global_size(parameter)} for {key}"
        raise OptimizerStateError(reason, fqn=key)


def _listed(names: set[Any]) -> str:
    shown = sorted(map(repr, names))
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
