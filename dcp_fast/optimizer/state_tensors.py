"""The tensors that optimizer state is loaded into: for each stored entry, which one this rank needs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, BytesStorageMetadata, Metadata, TensorStorageMetadata

from dcp_fast.errors import OptimizerStateError
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.optimizer.sharding import (
    ParameterSlice,
    RowSharding,
    data_parallel_group,
    empty_slices,
    like_parameter,
)
from dcp_fast.planning.search import global_size

# A key of the flattened optimizer state, as its path in the nested one: ("optim", "state", FQN, "exp_avg").
_Path = tuple[Any, ...]

# State that torch's optimizers keep in a plain tensor of no dimensions, also for a parameter of none.
_COUNTERS = ("step", "mu_product", "eta", "mu")


class StateTensors:
    """Chooses how each tensor of the optimizer's state is sharded, and allocates this rank's part of it.

    Args:
        model_state_dict, like: of load_sharded_optimizer_state_dict.
        slices: of this rank's parameters, by FQN.
        tensor_parallel: FQNs of the parameters of which any rank has a slice.
        is_partial: whether state of parameters that the model lacks is left out; else it is an error.
    """

    def __init__(
        self,
        model_state_dict: Mapping[str, Any],
        like: Literal["model"] | None,
        slices: Mapping[str, ParameterSlice],
        tensor_parallel: Collection[str],
        is_partial: bool,
    ) -> None:
        self._model = model_state_dict
        self._like = like
        self._is_partial = is_partial
        group = data_parallel_group(model_state_dict, slices, tensor_parallel)
        self._slices = {**slices, **empty_slices(model_state_dict, tensor_parallel, group)}
        self._rows = RowSharding(group)
        self._rows_of_slices = {each: RowSharding(each) for each in {part.group for part in self._slices.values()}}

    def allocate(self, entries: Mapping[str, tuple[_Path, STORAGE_TYPES]]) -> dict[str, Any]:
        """The flat state dict to load into: a tensor for each key, or a placeholder for a bytes entry.

        Args:
            entries: path and metadata of each key, as from :func:`optimizer_entries`.

        Raises:
            OptimizerStateError: the state does not fit the model.
        """
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
        if strangers and not self._is_partial:
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


def optimizer_entries(metadata: Metadata, optimizer_key: str) -> dict[str, tuple[_Path, STORAGE_TYPES]]:
    """The entries of an optimizer: by flat key, the path in the nested state dict and the metadata.

    Args:
        metadata: of the checkpoint.
        optimizer_key: the key of the optimizer's state dict in the state dict that was saved.

    Raises:
        OptimizerStateError: there are none, or parts of a tensor are stored nowhere.
    """
    paths = metadata.planner_data
    if not isinstance(paths, Mapping):
        raise OptimizerStateError(
            "the checkpoint does not say how its keys were nested (no planner data), so that the optimizer's cannot be "
            "told; it must be saved by a planner that flattens the state dict, such as DefaultSavePlanner"
        )
    entries = {}
    keys = set()
    stored = metadata.state_dict_metadata
    # Entries that nobody else has seen are planned with natively.
    for key, entry in stored.peek() if isinstance(stored, LazyDict) else stored.items():
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
