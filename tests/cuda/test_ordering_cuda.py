"""Loads among other work: torch's streams, loads that do not wait, threads, and the staging that loads share."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fast_reader, save
from simulated_cuda.control import Simulator

import dcp_fast

ROWS, COLUMNS = 700, 500
MIB = 1 << 20


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    values = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    return save(tmp_path / "stored", {"t": values, "u": values[:7] + 1})


def expected(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS).to(dtype)


def state_on(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "t": torch.empty(ROWS, COLUMNS, dtype=dtype, device=device),
        "u": torch.empty(COLUMNS, 7, dtype=dtype, device=device).t(),
    }


def assert_loaded(state: dict[str, Any]) -> None:
    wanted = expected(state["t"].dtype)
    assert torch.equal(state["t"].cpu(), wanted)
    assert torch.equal(state["u"].cpu(), wanted[:7] + 1)


def work_before_and_after(path: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> None:
    """On torch's current stream: fills that the load overwrites, and work that needs what it loaded."""
    state = state_on(device, dtype)
    for value in range(5):
        for tensor in state.values():
            tensor.fill_(value)
    dcp_fast.load(state, storage_reader=fast_reader(path, **options))
    copies = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in state.items()}
    for tensor in state.values():
        tensor.zero_()
    assert_loaded(copies)
    assert not any(tensor.count_nonzero() for tensor in state.values())


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("synchronize", [True, False])
@pytest.mark.parametrize("stream", ["default", "side"])
def test_work_before_and_after(
    cuda: torch.device, stored: Path, stream: str, synchronize: bool, dtype: torch.dtype
) -> None:
    with torch.cuda.stream(torch.cuda.Stream() if stream == "side" else None):
        work_before_and_after(stored, cuda, dtype, synchronize=synchronize)
        work_before_and_after(stored, cuda, dtype, synchronize=synchronize, pinned_bytes=MIB)


@pytest.mark.usefixtures("slow_copies")
def test_current_streams_of_two_devices(two_devices: tuple[torch.device, torch.device], stored: Path) -> None:
    streams = [torch.cuda.Stream(device) for device in two_devices]
    with torch.cuda.stream(streams[1]), torch.cuda.stream(streams[0]):
        states = {str(device): state_on(device) for device in two_devices}
        for state in states.values():
            state["t"].fill_(7)
        # The names of both are those of the checkpoint, as two replicas would have it.
        for state in states.values():
            dcp_fast.load(state, storage_reader=fast_reader(stored, synchronize=False))
        for state in states.values():
            assert_loaded(state)


@pytest.mark.usefixtures("simulator", "slow_copies")
def test_returns_before_the_last_copy(cuda: torch.device, stored: Path) -> None:
    state = state_on(cuda)
    torch.cuda.synchronize()
    dcp_fast.load(state, storage_reader=fast_reader(stored, synchronize=False))
    assert not torch.cuda.current_stream().query()
    assert_loaded(state)
    dcp_fast.load(state, storage_reader=fast_reader(stored))
    assert torch.cuda.current_stream().query()


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_freed_at_once(cuda: torch.device, stored: Path, dtype: torch.dtype) -> None:
    """What is freed and allocated again while copies are under way is written by its new owner only."""
    for _ in range(3):
        state = state_on(cuda, dtype)
        dcp_fast.load(state, storage_reader=fast_reader(stored, synchronize=False))
        del state
        others = [torch.full((ROWS, COLUMNS), 3, dtype=dtype, device=cuda) for _ in range(2)]
        assert all((other == 3).all() for other in others)


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("release", [True, False])
def test_freed_at_once_on_another_stream_than_it_was_made_on(cuda: torch.device, stored: Path, release: bool) -> None:
    """Torch's allocator would hand it out again: a load keeps its destinations alive as long as it writes them."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        state = state_on(cuda)
    torch.cuda.current_stream().wait_stream(side)
    dcp_fast.load(state, storage_reader=fast_reader(stored, synchronize=False))
    del state
    if release:
        dcp_fast.release_staging()
    with torch.cuda.stream(side):
        other = torch.full((ROWS, COLUMNS), 3, device=cuda)
    torch.cuda.synchronize()
    assert (other == 3).all()


@pytest.mark.parametrize("synchronize", [True, False])
def test_loads_in_threads(cuda: torch.device, stored: Path, synchronize: bool) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):
                    state = state_on(cuda)
                    dcp_fast.load(state, storage_reader=fast_reader(stored, synchronize=synchronize), no_dist=True)
                    assert_loaded(state)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


# Staging


def test_staging_is_used_again(cuda: torch.device, stored: Path, simulator: Simulator) -> None:
    torch.zeros(1, device=cuda)
    simulator.reset()
    for _ in range(3):
        dcp_fast.load(state_on(cuda), storage_reader=fast_reader(stored))
    assert simulator.calls("cuMemHostRegister_v2") == 1  # one slot is enough
    assert simulator.calls("cuModuleLoadData") == 2  # the compiled kernel, which the simulator refuses, and the text
    assert simulator.calls("cuStreamCreate") == 2
    dcp_fast.release_staging()
    for made, gone in (
        ("cuMemHostRegister_v2", "cuMemHostUnregister"),
        ("cuModuleGetFunction", "cuModuleUnload"),
        ("cuStreamCreate", "cuStreamDestroy_v2"),
    ):
        assert simulator.calls(gone) == simulator.calls(made), made
    dcp_fast.release_staging()


@pytest.mark.usefixtures("slow_copies")
def test_other_limits_one_after_another(cuda: torch.device, stored: Path) -> None:
    """The staging of the load before is freed, although it may be at work."""
    for synchronize in (False, True, False):
        for pinned, staging in ((MIB, 64 * MIB), (3 * MIB, 2 * MIB), (64 * MIB, MIB)):
            state = state_on(cuda)
            limits = {"pinned_bytes": pinned, "device_staging_bytes": staging, "block_bytes": MIB}
            dcp_fast.load(state, storage_reader=fast_reader(stored, synchronize=synchronize, **limits))
            report = dcp_fast.last_report()
            assert report is not None
            assert report.pinned_bytes <= pinned
            assert report.device_staging_bytes <= staging
            assert_loaded(state)
