"""The CUDA devices that tensors lie on, and which of them the engine can write to."""

from __future__ import annotations

import torch

__all__ = ["device_of", "refusals", "served_device"]

# What the driver of a device refused that loads need, by ordinal: see gpu.py.
refusals: dict[int, str] = {}


def device_of(tensor: torch.Tensor) -> int | None:
    """The ordinal of the CUDA device that holds a tensor's memory; None for the host and for all other devices."""
    # Under ROCm torch calls its devices by the same name, but they have another driver.
    return tensor.get_device() if tensor.is_cuda and torch.version.hip is None else None


def served_device(tensor: torch.Tensor) -> int | None:
    """The same, but None for a device whose driver refused what loads need: torch's ``copy_`` writes to that."""
    device = device_of(tensor)
    return None if device in refusals else device
