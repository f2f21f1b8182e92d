"""What the tests of the torch backend make and compare."""

from __future__ import annotations

import torch


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor's elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def counting(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """0, 1, 2 and so on."""
    return torch.arange(torch.Size(sizes).numel(), dtype=dtype).view(sizes)
