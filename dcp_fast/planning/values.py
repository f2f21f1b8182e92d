"""Values of a state dict that torch need not be asked about."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from typing_extensions import TypeIs

_WHOLE_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_whole(value: object) -> TypeIs[torch.Tensor]:
    """Whether a value of a state dict is certainly a whole tensor, and no part of a global one.

    Since torch 2.14 attributes can make a plain tensor a part (torch.distributed.checkpoint.protocol), so that a tensor
    with attributes is not certainly whole.
    """
    return type(value) in _WHOLE_TYPES and not value.__dict__


def plain_local_tensor(value: object) -> torch.Tensor | None:
    """The local tensor of a DTensor, if that has no attributes that tell more of it.

    It has the memory of what ``to_local()`` returns, without an autograd function on the way.
    """
    if type(value) is DTensor:
        local = value._local_tensor
        if type(local) in _WHOLE_TYPES and not local.__dict__:  # is_whole, without a call: loads ask it for each value
            return local
    return None
