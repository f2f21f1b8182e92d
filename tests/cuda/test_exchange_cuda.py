"""Ranks that share reads, with destinations on CUDA devices: what is received goes through the pinned ring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cuda_ranks import begin, end, exchange_on_devices, little_device_memory, only_simulated
from helpers import fill, torch_load, torch_reader
from ranks import Ranks
from shared_reads import be_on_nodes, failure_of, load_shared
from simulated_cuda.control import Simulator
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast
from dcp_fast import _native
from dcp_fast.ranks import exchange

WORLD = 2
FAILING = 1
HEADER_BYTES = 64  # of what a rank sends to another in a round
SIZE = (811, 203)
NOT_SUPPORTED = 801  # CUresult
LAUNCH_FAILED = 719
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


def refuse_pinned_memory() -> None:
    dcp_fast.release_staging()
    for nth in range(1, 50):
        for name in ("cuMemHostRegister_v2", "cuMemHostAlloc"):
            Simulator().fault(name, nth, NOT_SUPPORTED)


def state_dict(device: str, placements: list[Any], half: torch.dtype = torch.float16) -> dict[str, Any]:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    dtypes = {**STORED, "half": half}
    return {
        name: zeros_on(SIZE, dtype=dtype, device_mesh=mesh, placements=placements) for name, dtype in dtypes.items()
    }


def bits(state: dict[str, Any]) -> dict[str, list[int]]:
    return {name: value.to_local().cpu().contiguous().view(torch.uint8).tolist() for name, value in state.items()}


def load(path: Path) -> list[int]:
    begin()
    read = []
    for placements in PLACEMENTS:
        for half in (torch.float16, torch.bfloat16):  # the second is converted on the device
            expected, state = state_dict("cpu", placements, half), state_dict("cuda", placements, half)
            torch_load(expected, storage_reader=torch_reader(path))
            report = load_shared(state, path)
            assert bits(state) == bits(expected), placements
            assert isinstance(state["long"], DTensor)
            assert report.exchange_rounds > 2
            assert report.bytes_to_device >= report.bytes_needed - state["half"].to_local().nbytes
            assert report.sharing_fallback_reason == ""
            read.append(report.bytes_read)
    end()
    return read


def load_in_batches(path: Path) -> list[int]:
    """There is little memory on the device for what is converted there."""
    with little_device_memory(50_000):
        return load(path)


@pytest.mark.parametrize("load", [load, load_in_batches])
def test_loads(pool: Ranks, checkpoint: Path, load: Any) -> None:
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    for read in zip(*pool.run(WORLD, load, checkpoint, timeout=180), strict=True):
        assert sum(read) <= 1.1 * stored


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


def load_on_devices(path: Path) -> None:
    begin()
    simulator = Simulator()
    with exchange_on_devices():
        for placements in PLACEMENTS:
            expected, state = state_dict("cpu", placements), state_dict("cuda", placements)
            torch_load(expected, storage_reader=torch_reader(path))
            copies = simulator.calls("cuMemcpyDtoDAsync_v2")
            with mock.patch.object(_native, "PinnedBuffer", side_effect=_native.PinnedBuffer) as pinned:
                report = load_shared(state, path)
            assert pinned.call_count >= 4  # of two exchanges two rounds each, and so is what others are to get
            assert all(call.args[1] == dist.get_rank() % torch.cuda.device_count() for call in pinned.mock_calls)
            assert bits(state) == bits(expected), placements
            assert report.exchange_rounds > 2
            assert simulator.calls("cuMemcpyDtoDAsync_v2") > copies
            # What is received does not come from the host once more: that has the sent bytes, headers, and descriptors.
            sent = report.bytes_sent + report.bytes_read + report.exchange_rounds * 2 * 2 * HEADER_BYTES
            assert report.bytes_to_device <= 1.05 * sent
            expected = state_dict("cpu", placements, torch.bfloat16)
            state = state_dict("cuda", placements, torch.bfloat16)  # converted on the device
            torch_load(expected, storage_reader=torch_reader(path))
            assert load_shared(state, path).sharing_fallback_reason == ""
            assert bits(state) == bits(expected), placements
    end()


def load_pageable(path: Path) -> None:
    """The driver has no pinned memory to give to an exchange, but torch has what it allocated before."""
    begin()
    original = _native.PinnedBuffer
    refused = []

    def refuse(size: int, device: int) -> Any:
        for name in ("cuMemHostRegister_v2", "cuMemHostAlloc"):
            Simulator().fault(name, 1, NOT_SUPPORTED)
        refused.append(size)
        return original(size, device)

    with exchange_on_devices(), mock.patch.object(_native, "PinnedBuffer", refuse):
        expected, state = state_dict("cpu", [Replicate()]), state_dict("cpu", [Replicate()])
        torch_load(expected, storage_reader=torch_reader(path))
        assert load_shared(state, path).exchange_rounds > 2
        assert bits(state) == bits(expected)
    assert len(refused) > 4
    end()


@only_simulated
def test_memory_that_cannot_be_pinned(pool: Ranks, checkpoint: Path) -> None:
    pool.run(WORLD, load_pageable, checkpoint, timeout=180)


@only_simulated
def test_what_devices_receive_is_placed_from_there(pool: Ranks, checkpoint: Path) -> None:
    pool.run(WORLD, load_on_devices, checkpoint, timeout=180)


def load_mixed(path: Path) -> None:
    """Some tensors are for the host: what is received is needed on both."""
    begin()
    with exchange_on_devices():
        for placements in PLACEMENTS:
            expected = state_dict("cpu", placements)
            torch_load(expected, storage_reader=torch_reader(path))
            state = {**state_dict("cpu", placements), "single": state_dict("cuda", placements)["single"]}
            assert load_shared(state, path).exchange_rounds > 2
            assert bits(state) == bits(expected), placements
    end()


@only_simulated
def test_tensors_on_hosts_and_devices(pool: Ranks, checkpoint: Path) -> None:
    pool.run(WORLD, load_mixed, checkpoint, timeout=180)


def load_on_devices_of_nodes(path: Path) -> None:
    with exchange_on_devices():
        load_on_nodes(path)


@only_simulated
def test_devices_on_two_nodes(pool: Ranks, checkpoint: Path) -> None:
    pool.run(4, load_on_devices_of_nodes, checkpoint, timeout=180)


def load_on_devices_with_faults(path: Path) -> list[Any]:
    with exchange_on_devices():
        found = load_with_faults(path)
        state = state_dict("cuda", [Replicate()])
        for nth in range(3):
            begin()
            if dist.get_rank() == FAILING:
                Simulator().fault("cuMemcpyDtoDAsync_v2", 1 + nth, 700)
            found.append(failure_of(partial(load_shared, state, path)))
            if dist.get_rank() == FAILING:
                Simulator().reset()
            dcp_fast.release_staging()
        return found


@only_simulated
def test_faults_of_devices(pool: Ranks, checkpoint: Path) -> None:
    for found in pool.run(WORLD, load_on_devices_with_faults, checkpoint, timeout=180):
        assert found[:4] == [{FAILING: "MetadataAccessError"}, *[{FAILING: "FileAccessError"}] * 3]
        assert found[4:] == [{FAILING: "CudaError"}] * 3


def load_with_a_copy_that_fails(path: Path, nth: int, direction: str) -> tuple[Any, int]:
    """A copy between host and GPU fails on one rank in the nth round.

    Returns:
        What the load fails with, and how many rounds this rank takes part in.
    """
    begun = 0
    original, start = exchange.Exchange._begin_round, exchange.start_all_to_all

    def fail(at: str) -> None:
        if at == direction and begun == nth + 1 and dist.get_rank() == FAILING:
            Simulator().fault(f"cuMemcpy{direction}Async_v2", 1, LAUNCH_FAILED)

    def begin_round(self: exchange.Exchange, *args: Any) -> Any:
        nonlocal begun
        begun += 1
        fail("HtoD")  # what is sent is copied next
        return original(self, *args)

    def start_all_to_all(*args: Any) -> Any:
        wait = start(*args)

        def then_fail() -> None:
            wait()
            fail("DtoH")  # what was received is copied next

        return then_fail

    with (
        exchange_on_devices(),
        mock.patch.object(exchange.Exchange, "_begin_round", begin_round),
        mock.patch.object(exchange, "start_all_to_all", start_all_to_all),
    ):
        state = {**state_dict("cpu", [Replicate()]), "single": state_dict("cuda", [Replicate()])["single"]}
        return failure_of(partial(load_shared, state, path)), begun


def load_with_copies_that_fail(path: Path, direction: str) -> list[tuple[Any, int, int]]:
    begin()
    _, rounds = load_with_a_copy_that_fails(path, -1, direction)
    rounds_of = [0, rounds // 2, rounds - 1]
    found = [(nth, *load_with_a_copy_that_fails(path, nth, direction)) for nth in rounds_of]
    assert load_with_a_copy_that_fails(path, -1, direction) == ("nothing", rounds)  # the process group is as it was
    end()
    return found


@only_simulated
@pytest.mark.parametrize("direction", ["HtoD", "DtoH"])
def test_copies_that_fail(pool: Ranks, checkpoint: Path, direction: str) -> None:
    """Nobody waits for the rank: all learn of it in the round of a copy to the GPU, or in the one after a copy back."""
    first, second = pool.run(WORLD, load_with_copies_that_fail, checkpoint, direction, timeout=180)
    assert first == second
    for nth, failure, begun in first:
        assert failure == {FAILING: "AcceleratorError"}
        assert begun <= nth + (1 if direction == "HtoD" else 2)


class Committing(dcp.DefaultLoadPlanner):
    """Adds to what has come, on the device."""

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        tensor.add_(1)


def load_with_commits(path: Path) -> None:
    begin()
    for placements in PLACEMENTS:
        expected, state = state_dict("cpu", placements), state_dict("cuda", placements)
        torch_load(expected, storage_reader=torch_reader(path), planner=Committing())
        report = load_shared(state, path, planner=Committing())
        assert bits(state) == bits(expected), placements
        assert report.exchange_rounds > 2
        assert report.sharing_fallback_reason == ""
    end()


def test_planners_that_commit(pool: Ranks, checkpoint: Path) -> None:
    pool.run(WORLD, load_with_commits, checkpoint, timeout=180)


class Resolving(dcp.DefaultLoadPlanner):
    """Loads some into memory of its own."""

    def resolve_tensor(self, item: Any) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        return torch.empty_like(self.target) if item.dest_index.fqn == "single" else self.target

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor)
        self.target.add_(1)


def load_resolved(path: Path) -> list[int]:
    begin()
    read = []
    for placements in PLACEMENTS:
        expected, state = state_dict("cpu", placements), state_dict("cuda", placements)
        torch_load(expected, storage_reader=torch_reader(path), planner=Resolving())
        report = load_shared(state, path, planner=Resolving())
        assert bits(state) == bits(expected), placements
        assert report.sharing_fallback_reason == ""
        read.append(report.bytes_read)
    end()
    return read


def load_resolved_on_devices(path: Path) -> list[int]:
    with exchange_on_devices():
        return load_resolved(path)


@pytest.mark.parametrize("load", [load_resolved, pytest.param(load_resolved_on_devices, marks=only_simulated)])
def test_planners_that_resolve(pool: Ranks, checkpoint: Path, load: Any) -> None:
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    for read in zip(*pool.run(WORLD, load, checkpoint, timeout=180), strict=True):
        assert sum(read) <= 1.1 * stored


def load_with_commits_where_a_driver_refuses(path: Path) -> str:
    """The rank whose driver has no pinned memory to give takes part, and gets what it needs from torch."""
    begin()
    expected, state = state_dict("cpu", [Replicate()]), state_dict("cuda", [Replicate()])
    torch_load(expected, storage_reader=torch_reader(path), planner=Committing())
    if dist.get_rank() == FAILING:
        refuse_pinned_memory()
    report = load_shared(state, path, planner=Committing())
    assert bits(state) == bits(expected)
    if dist.get_rank() == FAILING:
        Simulator().reset()
    dcp_fast.release_staging()
    return report.device_fallback_reason


@only_simulated
def test_planners_that_commit_where_a_driver_refuses(pool: Ranks, checkpoint: Path) -> None:
    reasons = pool.run(WORLD, load_with_commits_where_a_driver_refuses, checkpoint, timeout=180)
    assert [bool(reason) for reason in reasons] == [rank == FAILING for rank in range(WORLD)]
