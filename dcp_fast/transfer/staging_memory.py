"""Staging memory: what bytes pass through on their way, on the host or on a GPU."""

from __future__ import annotations

import torch

from dcp_fast.errors import CudaOutOfMemoryError


def allocate(capacity: int, device: torch.device) -> torch.Tensor:
    """Memory of so many bytes.

    Raises:
        CudaOutOfMemoryError: a GPU has no more.
        MemoryError: the host has no more.
    """
    try:
        return torch.empty(capacity, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise CudaOutOfMemoryError(
            f"{capacity} bytes of staging memory on {device} could not be had: {error}"
        ) from error
    except RuntimeError as error:  # what torch's allocator raises on the CPU
        raise MemoryError(f"{capacity} bytes for a bounce buffer could not be had") from error
