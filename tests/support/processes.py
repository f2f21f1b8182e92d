"""Processes of tests that use CUDA devices: what a child must do before its first one."""

from __future__ import annotations

import os

from simulated_cuda import torch_backend

__all__ = ["SIMULATED", "use_devices"]

SIMULATED = "DCP_FAST_LIBCUDA" in os.environ


def use_devices() -> None:
    """Let torch have the simulated devices, if this process is to use those. Touches no device."""
    if SIMULATED:
        torch_backend.install()
