"""Values of a state dict that torch need not be asked about."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from typing_extensions import TypeIs

__all__ = ["is_whole", "plain_local_tensor"]

_WHOLE_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_whole(value: object) -> TypeIs[torch.Tensor]:
    """Whether a value of a state dict can be nothing but a whole tensor, rather than a part of a global one.

    Attributes of its own may make any tensor a part (torch.distributed.checkpoint.protocol, since torch 2.14).
    """
    return type(value) in _WHOLE_TYPES and not value.__dict__


def plain_local_tensor(value: object) -> torch.Tensor | None:
    """The local tensor of a DTensor, if that has no attributes that tell more of it.

    It has the memory of what ``to_local()`` returns, without an autograd function on the way.
    """
    if type(value) is DTensor and is_whole(local := value._local_tensor):
        return local
    return None
