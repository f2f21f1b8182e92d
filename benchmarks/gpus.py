"""The GPUs of this machine, by their torch names. Without any, all but ``why_there_is_none`` is a no-op or empty."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from benchmarks import prelude

SIMULATED = "simulated devices: the figures mean nothing"


def why_there_is_none() -> str | None:
    """None where there is a GPU to load to, else the reason why not."""
    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, and dcp_fast's path to GPUs is for CUDA"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no NVIDIA GPU, or no driver for it"


def names() -> tuple[str, ...]:
    """``cuda:0`` and so on."""
    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))


def of(values: Iterable[object]) -> set[torch.device]:
    """The GPUs that hold some of the tensors."""
    return {value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda}


def wait_for(devices: Iterable[torch.device]) -> None:
    """Return when nothing that was launched on the devices is under way any more."""
    for device in devices:
        torch.cuda.synchronize(device)


def release_cached() -> None:
    """Give memory that torch keeps for later back to the driver."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def used_bytes(devices: Iterable[torch.device]) -> dict[torch.device, int]:
    """Memory in use on each device, whoever allocated it. Simulated ones do not tell."""
    used = {}
    for device in devices if not simulated() else ():
        free, total = torch.cuda.mem_get_info(device)
        used[device] = total - free
    return used


def simulated() -> bool:
    """Whether the devices are none, but what a prelude made torch believe in."""
    return prelude.VARIABLE in os.environ


def models() -> list[str]:
    """What each of them is."""
    return [torch.cuda.get_device_name(name) for name in names()]
