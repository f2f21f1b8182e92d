"""Ranks that share reads, with destinations on CUDA devices: what is received goes through the pinned ring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import fill, torch_load, torch_reader
from processes import SIMULATED, use_devices
from ranks import Ranks
from shared_reads import be_on_nodes, failure_of, load_shared
from simulated_cuda.control import Simulator
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast
from dcp_fast import _native

WORLD = 2
FAILING = 1
SIZE = (811, 203)
STORED = {"single": torch.float32, "half": torch.float16, "long": torch.int64}
PLACEMENTS: list[list[Any]] = [[Replicate()], [Shard(1)], [Shard(0)]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Ranks of this module alone: what makes simulated devices of torch's stays in a process."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save(
        {name: fill(SIZE, dtype, number) for number, (name, dtype) in enumerate(STORED.items())},
        checkpoint_id=tmp_path / "checkpoint",
    )
    return tmp_path / "checkpoint"


def begin() -> None:
    use_devices()
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())


def end() -> None:
    dcp_fast.release_staging()
    torch.cuda.synchronize()
    if SIMULATED:
        assert not Simulator().reports(clear=True)


def state_dict(device: str, placements: list[Any], half: torch.dtype = torch.float16) -> dict[str, Any]:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    dtypes = {**STORED, "half": half}
    return {
        name: zeros_on(SIZE, dtype=dtype, device_mesh=mesh, placements=placements) for name, dtype in dtypes.items()
    }


def bits(state: dict[str, Any]) -> dict[str, list[int]]:
    return {name: value.to_local().cpu().contiguous().view(torch.uint8).tolist() for name, value in state.items()}


def load(path: Path) -> None:
    begin()
    for placements in PLACEMENTS:
        for half in (torch.float16, torch.bfloat16):  # the second is converted on the device, and read alone
            expected, state = state_dict("cpu", placements, half), state_dict("cuda", placements, half)
            torch_load(expected, storage_reader=torch_reader(path))
            report = load_shared(state, path)
            assert bits(state) == bits(expected), placements
            assert isinstance(state["long"], DTensor)
            assert report.exchange_rounds > 2
            assert report.bytes_to_device >= report.bytes_needed - state["half"].to_local().nbytes
    end()


def test_loads(pool: Ranks, checkpoint: Path) -> None:
    pool.run(WORLD, load, checkpoint, timeout=180)


def load_on_nodes(path: Path) -> None:
    """What one rank of the second node receives, it passes on to the other one."""
    begin()
    expected, state = state_dict("cpu", [Replicate()]), state_dict("cuda", [Replicate()])
    torch_load(expected, storage_reader=torch_reader(path))
    rounds = load_shared(state, path).exchange_rounds
    with be_on_nodes(2):
        state = state_dict("cuda", [Replicate()])
        report = load_shared(state, path)
    assert bits(state) == bits(expected)
    assert report.exchange_rounds > rounds
    end()


def test_loads_on_two_nodes(pool: Ranks, checkpoint: Path) -> None:
    pool.run(4, load_on_nodes, checkpoint, timeout=180)


def load_with_faults(path: Path) -> list[Any]:
    begin()
    found = []
    for nth in (0, 3, 5, 7):
        with ExitStack() as faults:
            if dist.get_rank() == FAILING:
                faults.enter_context(_native.FaultInjection("pread", nth, 5, repeat=1 << 30))
            reader = dcp_fast.FileSystemReader(path, io="cached")
            found.append(
                failure_of(partial(load_shared, state_dict("cuda", [Replicate()]), path, storage_reader=reader))
            )
    end()
    return found


def test_reads_that_fail(pool: Ranks, checkpoint: Path) -> None:
    for found in pool.run(WORLD, load_with_faults, checkpoint, timeout=180):
        assert found == [{FAILING: "MetadataAccessError"}, *[{FAILING: "FileAccessError"}] * 3]
