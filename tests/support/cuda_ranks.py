"""Ranks with a CUDA device each, which share reads."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import SIMULATED, use_devices
from simulated_cuda.control import Simulator

import dcp_fast
from dcp_fast.ranks import exchange
from dcp_fast.transfer.gpu import CudaLoad

__all__ = ["begin", "end", "exchange_on_devices", "little_device_memory", "only_simulated"]

# A process group such as NCCL's, which exchanges in the memory of devices. For simulated devices gloo does that too.
only_simulated = pytest.mark.skipif(not SIMULATED, reason="gloo has no all_to_all for the memory of a real GPU")


def begin() -> None:
    use_devices()
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())


def end() -> None:
    dcp_fast.release_staging()
    torch.cuda.synchronize()
    if SIMULATED:
        assert not Simulator().reports(clear=True)


def exchange_on_devices() -> Any:
    def device(_: Any) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    return mock.patch.object(exchange, "collective_device", device)


def little_device_memory(most_bytes: int) -> Any:
    """What is converted or dequantized on a device has buffers of so many bytes there."""
    original = CudaLoad.half_bytes
    return mock.patch.object(CudaLoad, "half_bytes", lambda self, wanted: original(self, min(wanted, most_bytes)))
