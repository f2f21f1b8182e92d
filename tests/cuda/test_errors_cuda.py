"""Loads to CUDA devices that fail: calls and work of the driver, files, memory. All is typed, and nothing goes on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import by_offset, fast_error, metadata_calls, save_state, span, wanted
from device_tensors import bits
from helpers import assert_same_load, fill, save
from simulated_cuda.control import Simulator

import dcp_fast
from dcp_fast import _native

OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED, UNKNOWN = 2, 700, 719, 999  # CUresult
MIB = 1 << 20

LARGE, SMALL = fill((600, 1000), torch.float32, 1), fill((4, 5), torch.int16, 2)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "stored", {"large": LARGE, "small": SMALL})


def state_on(cuda: torch.device) -> dict[str, Any]:
    """One destination that is copied straight, and one that the kernel places."""
    state = {
        "large": torch.zeros(600, 1000, device=cuda),
        "small": torch.zeros(5, 4, dtype=torch.int16, device=cuda).t(),
    }
    torch.cuda.synchronize()
    return state


def assert_loads(path: Path, cuda: torch.device, **options: Any) -> None:
    state = state_on(cuda)
    assert fast_error(path, state, **options) is None
    assert bits(state["large"]) == bits(LARGE)
    assert bits(state["small"]) == bits(SMALL)


# Calls of the driver

CALLS = [
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemHostRegister_v2",
    "cuMemAlloc_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuMemcpyHtoDAsync_v2",
    "cuLaunchKernel",
    "cuEventSynchronize",
    "cuEventElapsedTime",
]
# Calls for the boxes of one slot, of which the first is named. A launch that had to wait for the kernel is not.
FOR_BOXES = {"cuMemcpyHtoDAsync_v2"}
# Memory is asked for again, once torch has given back what it does not use.
ASKED_AGAIN = {"cuMemAlloc_v2", "cuMemHostRegister_v2"}


@pytest.mark.parametrize("function", CALLS)
def test_failing_call(cuda: torch.device, stored: Path, simulator: Simulator, function: str) -> None:
    """The first calls of each function in a load, and the last one."""
    limits = {"pinned_bytes": MIB}
    dcp_fast.release_staging()
    state = state_on(cuda)
    before = simulator.calls(function)
    assert fast_error(stored, state, **limits) is None
    count = simulator.calls(function) - before
    assert count > 0
    number = OUT_OF_MEMORY if function in ASKED_AGAIN else UNKNOWN
    for nth in sorted({*range(1, min(count, 7)), count}):
        dcp_fast.release_staging()
        state = state_on(cuda)
        simulator.fault(function, nth, number)
        error = fast_error(stored, state, **limits)
        simulator.reset()
        if error is None:  # a call that gives something back, or that puts back what was before
            assert function in {"cuCtxGetCurrent", "cuCtxSetCurrent", *ASKED_AGAIN}
            assert bits(state["large"]) == bits(LARGE)
            continue
        assert isinstance(error, dcp_fast.CudaError), error
        assert f"cuda:0: {function} failed: CUDA_ERROR_" in str(error)
        assert isinstance(error, torch.OutOfMemoryError) == (number == OUT_OF_MEMORY)
        assert isinstance(error, dcp_fast.CudaOutOfMemoryError) == (number == OUT_OF_MEMORY)
        if function in FOR_BOXES:
            assert error.fqn in state
            assert error.path == str(span(stored, error.fqn).path)
        assert_loads(stored, cuda, **limits)


@pytest.mark.parametrize(
    ("function", "number"), [("cuMemcpyHtoDAsync_v2", ILLEGAL_ADDRESS), ("cuLaunchKernel", LAUNCH_FAILED)]
)
@pytest.mark.parametrize("options", [{"pinned_bytes": MIB}, {}])
def test_failing_work(
    cuda: torch.device, stored: Path, simulator: Simulator, function: str, number: int, options: dict[str, Any]
) -> None:
    """The call succeeds, and what it enqueued fails later: the context is lost."""
    state = state_on(cuda)
    simulator.fault(function, 1, number, asynchronous=True)
    error = fast_error(stored, state, **options)
    assert isinstance(error, dcp_fast.CudaError)
    assert "cuda:0: cu" in str(error)
    assert "CUDA_ERROR_" in str(error)
    simulator.reset()
    dcp_fast.release_staging()
    assert_loads(stored, cuda, **options)


def test_failing_work_that_nobody_waited_for(cuda: torch.device, stored: Path, simulator: Simulator) -> None:
    """Whoever comes next is told, be it torch or a load."""
    state = state_on(cuda)
    simulator.fault("cuLaunchKernel", 1, LAUNCH_FAILED, asynchronous=True)
    error = fast_error(stored, state, synchronize=False)
    if error is None:
        with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
            torch.cuda.synchronize()
        error = fast_error(stored, state)
    assert isinstance(error, dcp_fast.CudaError)
    simulator.reset()
    assert_loads(stored, cuda)


# Memory


@pytest.fixture
def full_device(simulator: Simulator) -> Iterator[Simulator]:
    """A way to have no memory left: `set("memory_mb", 0)`."""
    dcp_fast.release_staging()
    yield simulator
    simulator.set("memory_mb", 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_device_without_memory(cuda: torch.device, tmp_path: Path, full_device: Simulator, dtype: torch.dtype) -> None:
    """Neither for boxes that the kernel places nor for those that are converted."""
    save(tmp_path, {"t": torch.ones(30, 40)})
    state = {"t": torch.zeros(40, 30, dtype=dtype, device=cuda).t()}
    torch.cuda.synchronize()
    full_device.set("memory_mb", 0)
    error = fast_error(tmp_path, state)
    assert isinstance(error, dcp_fast.CudaOutOfMemoryError)
    assert isinstance(error, torch.OutOfMemoryError)
    assert isinstance(error, MemoryError)
    assert "cuda:0" in str(error)
    full_device.set("memory_mb", 4096)
    assert state["t"].count_nonzero() == 0
    assert fast_error(tmp_path, state) is None
    assert (state["t"] == 1).all()


def test_straight_copies_need_no_device_memory(cuda: torch.device, tmp_path: Path, full_device: Simulator) -> None:
    save(tmp_path, {"t": torch.ones(300, 400)})
    state = {"t": torch.zeros(300, 400, device=cuda)}
    torch.cuda.synchronize()
    full_device.set("memory_mb", 0)
    assert fast_error(tmp_path, state) is None
    full_device.set("memory_mb", 4096)
    assert (state["t"] == 1).all()


# Files


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("synchronize", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, 0])
def test_failing_read(cuda: torch.device, stored: Path, number: int, synchronize: bool) -> None:
    """The errors are those of a load into host memory; an end of the file that comes too early (0) is one of them."""
    on_host = {"large": torch.zeros(600, 1000), "small": torch.zeros(5, 4, dtype=torch.int16).t()}
    kinds = set()
    limits = {"pinned_bytes": MIB, "block_bytes": MIB // 4, "threads": 2, "synchronize": synchronize}
    first = metadata_calls(stored, "pread")
    for nth in range(first, first + 20, 2):
        errors = []
        state = state_on(cuda)
        for destinations in (on_host, state):
            with _native.FaultInjection("pread", nth=nth, error_number=number, repeat=1 << 60, short_bytes=0):
                errors.append(fast_error(stored, destinations, **limits))
        if errors[1] is None:
            break
        kinds.add(type(errors[1]))
        images = {name: bits(tensor) for name, tensor in state.items()}
        if errors[0] is not None:  # a load into host memory takes fewer reads
            assert type(errors[1]) is type(errors[0])
        assert isinstance(errors[1], dcp_fast.LoadError)
        assert errors[1].fqn in state
        assert errors[1].path == str(span(stored, errors[1].fqn).path)
        torch.cuda.synchronize()
        assert {name: bits(tensor) for name, tensor in state.items()} == images, "written after the error"
    expected = {errno.EIO: dcp_fast.FileAccessError, errno.EACCES: dcp_fast.FilePermissionError}
    assert kinds == {expected.get(number, dcp_fast.TruncatedFileError)}
    assert_loads(stored, cuda, **limits)


@pytest.mark.usefixtures("slow_copies")
def test_failing_read_after_a_load_that_nobody_waited_for(cuda: torch.device, stored: Path) -> None:
    """Both use the same staging, which outlives the failed load as long as the first one is under way."""
    limits = {"pinned_bytes": MIB, "block_bytes": MIB // 4, "threads": 2, "synchronize": False}
    states = [state_on(cuda), state_on(cuda)]
    assert fast_error(stored, states[0], **limits) is None
    with _native.FaultInjection(
        "pread", nth=8 + metadata_calls(stored, "pread"), error_number=errno.EIO, repeat=1 << 60
    ):
        assert isinstance(fast_error(stored, states[1], **limits), dcp_fast.FileAccessError)
    image = bits(states[1]["large"])
    torch.cuda.synchronize()
    assert bits(states[1]["large"]) == image
    assert bits(states[0]["large"]) == bits(LARGE)


def test_short_reads(cuda: torch.device, stored: Path) -> None:
    state = state_on(cuda)
    with _native.FaultInjection("pread", nth=0, repeat=1 << 60, short_bytes=1000):
        assert fast_error(stored, state) is None
    assert bits(state["large"]) == bits(LARGE)


@pytest.mark.parametrize("damage", ["truncated", "missing", "directory", "overwritten"])
def test_damaged_file(cuda: torch.device, tmp_path: Path, damage: str) -> None:
    path = save_state(tmp_path / "stored")
    (_, first), *_ = by_offset(path)
    if damage == "truncated":
        with first.path.open("r+b") as file:
            file.truncate(first.path.stat().st_size // 2)
    elif damage == "overwritten":
        with first.path.open("r+b") as file:
            file.write(b"\xff" * 2000)
    else:
        first.path.unlink()
        if damage == "directory":
            first.path.mkdir()
    on_host = wanted()
    on_device = {k: v.to(cuda) if isinstance(v, torch.Tensor) else v for k, v in wanted().items()}
    errors = [fast_error(path, state) for state in (on_host, on_device)]
    assert isinstance(errors[0], dcp_fast.LoadError)
    assert type(errors[1]) is type(errors[0])
    assert vars(errors[1]) == vars(errors[0])
    for name, tensor in on_host.items():
        assert not isinstance(tensor, torch.Tensor) or bits(on_device[name]) == bits(tensor)


def test_box_that_does_not_fit(cuda: torch.device, stored: Path) -> None:
    class Wrong(dcp_fast.DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return torch.zeros(3, device=cuda)

    make = lambda: {"small": torch.zeros(4, 5, dtype=torch.int16, device=cuda)}  # noqa: E731
    assert_same_load(stored, make, planner=Wrong, raises=AssertionError)
