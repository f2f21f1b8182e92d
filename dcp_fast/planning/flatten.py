"""Flattening of nested state dicts in one walk, where torch's planner takes four."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_fast import _native
from dcp_fast._torch import ShardedTensor

# Each is a leaf, whatever it holds. Subclasses may be more than that to torch: a ShardedTensor is, if it holds another.
_TENSORS = (torch.Tensor, torch.nn.Parameter, DTensor)

_Path = tuple[str | int, ...]


def flatten_at_once(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, _Path]] | None:
    """What torch's ``DefaultLoadPlanner.set_up_planner`` makes of a state dict: its leaves by FQN, and their paths.

    As torch does, this puts a copy of every list in the list's place.

    Returns:
        None if a state dict has anything for which torch does more than to walk through it: tensors on the meta device
        or of other classes, keys and containers of other types, FQNs that clash. Then torch has to do it.
    """
    return _native.flatten(state_dict, _TENSORS, ShardedTensor, OrderedDict) if type(state_dict) is dict else None


def containers_of(state_dict: dict[str, Any]) -> set[str] | None:
    """The FQNs of all dicts and lists in a state dict; None if it holds anything that torch may take for one, too."""
    return _native.containers(state_dict, _TENSORS, ShardedTensor, OrderedDict) if type(state_dict) is dict else None
