"""Values of a state dict that torch need not be asked about."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from typing_extensions import TypeIs

WHOLE_TYPES = (torch.Tensor, torch.nn.Parameter)
# Methods of a DTensor that torch asks, and that an attribute of the tensor's own would hide.
OVERRIDES = (
    "__create_chunk_list__",
    "__get_tensor_shard__",
    "_raise_if_contains_partial_placements",
    "size",
    "to_local",
)


def is_whole(value: object) -> TypeIs[torch.Tensor]:
    """Whether a value of a state dict is certainly a whole tensor, and no part of a global one.

    Since torch 2.14 attributes can make a plain tensor a part (torch.distributed.checkpoint.protocol), so that a tensor
    with attributes is not certainly whole.
    """
    return type(value) in WHOLE_TYPES and not value.__dict__


def plain_local_tensor(value: object) -> torch.Tensor | None:
    """The local tensor of a DTensor, if neither has attributes that tell more of it.

    It has the memory of what ``to_local()`` returns, without an autograd function on the way.
    """
    if type(value) is DTensor and not (value.__dict__ and any(name in value.__dict__ for name in OVERRIDES)):
        local = value._local_tensor
        if type(local) in WHOLE_TYPES and not local.__dict__:  # is_whole, without a call: loads ask it for each value
            return local
    return None
