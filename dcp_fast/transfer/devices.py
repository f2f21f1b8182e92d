"""The CUDA devices that tensors lie on, and which of them the engine can write to."""

from __future__ import annotations

import torch

# By the ordinal of a device: why its driver refuses what loads need. Kept by gpu.py.
refusals: dict[int, str] = {}


def device_of(tensor: torch.Tensor) -> int | None:
    """The ordinal of the CUDA device that holds a tensor's memory; None for the host and for all other devices."""
    # Under ROCm torch calls its devices by the same name, but they have another driver.
    return tensor.get_device() if tensor.is_cuda and torch.version.hip is None else None


def served_device(tensor: torch.Tensor) -> int | None:
    """As :func:`device_of`, but None if the device's driver refuses what loads need: torch's ``copy_`` writes there."""
    device = device_of(tensor)
    return None if device in refusals else device
