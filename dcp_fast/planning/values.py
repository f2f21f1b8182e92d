"""Values of a state dict: which torch need not be asked about, and where those of bytes entries go."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.tensor import DTensor

from dcp_fast import _native
from dcp_fast._torch import set_element

_WHOLE_TYPES = (torch.Tensor, torch.nn.Parameter)
# Methods of a DTensor that torch asks, and that an attribute of the tensor's own would hide.
_OVERRIDES = (
    "__create_chunk_list__",
    "__get_tensor_shard__",
    "_raise_if_contains_partial_placements",
    "size",
    "to_local",
)


TENSOR_TYPES = _native.TensorTypes(DTensor, _WHOLE_TYPES, _OVERRIDES)

# Whether a value of a state dict is certainly a whole tensor, and no part of a global one. Since torch 2.14 attributes
# can make a plain tensor a part (torch.distributed.checkpoint.protocol), so that one with attributes is not certain.
is_whole = TENSOR_TYPES.is_whole
# The local tensor of a DTensor, if neither has attributes that tell more of it; else None. It has the memory of what
# ``to_local()`` returns, without an autograd function on the way.
plain_local_tensor = TENSOR_TYPES.plain_local_tensor


def put_value(planner: DefaultLoadPlanner, fqn: str, value: Any) -> None:
    """Put the value of a bytes entry into the state dict, where torch's planner puts it."""
    if not planner.flatten_state_dict:
        planner.state_dict[fqn] = value
        return
    path = planner.mappings[fqn]
    if len(path) == 1:
        planner.original_state_dict[path[0]] = value  # type: ignore[index]
    else:
        set_element(planner.original_state_dict, path, value)
