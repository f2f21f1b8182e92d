"""Drivers that do not give what a load to GPUs needs: it loads all the same, says why it is slow, and says it once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import fast_error
from device_tensors import bits
from helpers import fast_reader, fill, save
from simulated_cuda.control import Simulator

import dcp_fast

OUT_OF_MEMORY, NO_BINARY, NO_COMPILER, NOT_SUPPORTED = 2, 209, 221, 801  # CUresult
MIB = 1 << 20

LARGE, SMALL, WIDE = fill((600, 1000), torch.float32, 1), fill((4, 5), torch.int16, 2), fill((50, 60), torch.float32, 3)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "stored", {"large": LARGE, "small": SMALL, "wide": WIDE, "step": 7})


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No staging of an earlier test, and no refusal that is remembered."""
    dcp_fast.release_staging()


def state_on(cuda: torch.device) -> dict[str, Any]:
    """Destinations that are copied straight, placed by the kernel, and converted; and one on the host."""
    state = {
        "large": torch.zeros(600, 1000, device=cuda),
        "small": torch.zeros(5, 4, dtype=torch.int16, device=cuda).t(),
        "wide": torch.zeros(50, 60, dtype=torch.bfloat16, device=cuda),
        "step": 0,
    }
    torch.cuda.synchronize()
    return state


def assert_right(state: dict[str, Any]) -> None:
    assert bits(state["large"]) == bits(LARGE)
    assert bits(state["small"]) == bits(SMALL)
    assert bits(state["wide"]) == bits(WIDE.to(torch.bfloat16))
    assert state["step"] == 7


def refuse(simulator: Simulator, function: str, number: int, first: int = 1) -> None:
    for nth in range(first, first + 50):
        simulator.fault(function, nth, number)


def loaded(path: Path, cuda: torch.device, **options: Any) -> dcp_fast.LoadReport:
    state = state_on(cuda)
    dcp_fast.load(state, storage_reader=fast_reader(path, **options))
    assert_right(state)
    report = dcp_fast.last_report()
    assert report is not None
    return report


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("number", [OUT_OF_MEMORY, NOT_SUPPORTED])
def test_memory_that_cannot_be_registered_is_the_drivers_own(
    cuda: torch.device, stored: Path, simulator: Simulator, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(simulator, "cuMemHostRegister_v2", number)
    before = simulator.calls("cuMemHostAlloc")
    report = loaded(stored, cuda)
    assert simulator.calls("cuMemHostAlloc") > before
    assert report.device_fallback_items == 0
    assert report.device_copies > 0
    assert not warnings_of(caplog)
    simulator.reset()


@pytest.mark.parametrize("synchronize", [True, False])
def test_no_pinned_memory_at_all(
    cuda: torch.device, stored: Path, simulator: Simulator, synchronize: bool, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(simulator, "cuMemHostRegister_v2", NOT_SUPPORTED)
    refuse(simulator, "cuMemHostAlloc", NOT_SUPPORTED)
    for _ in range(2):
        report = loaded(stored, cuda, synchronize=synchronize)
        assert report.device_fallback_items == 3
        assert "cuda:0: cuMemHostRegister_v2 failed: CUDA_ERROR_NOT_SUPPORTED" in report.device_fallback_reason
        assert "device fallback items" in str(report)
        assert report.device_copies == 0
        assert report.bytes_needed == sum(t.nbytes for t in (LARGE, SMALL, WIDE)) + report_of_step(stored)
    assert len(warnings_of(caplog)) == 1
    assert "torch's copy_" in warnings_of(caplog)[0]
    simulator.reset()
    assert loaded(stored, cuda).device_fallback_items > 0  # remembered ...
    dcp_fast.release_staging()
    report = loaded(stored, cuda)  # ... until then
    assert report.device_fallback_items == 0
    assert report.device_copies > 0


def report_of_step(path: Path) -> int:
    """The bytes of the entry that is no tensor."""
    dcp_fast.load({"step": 0}, checkpoint_id=path)
    report = dcp_fast.last_report()
    assert report is not None
    return report.bytes_needed


def test_less_pinned_memory_than_wanted(cuda: torch.device, tmp_path: Path, simulator: Simulator) -> None:
    """As where a container may lock a few megabytes: the ring is what there is."""
    path = save(tmp_path / "eight", {"t": torch.ones(2 * MIB)})
    refuse(simulator, "cuMemHostRegister_v2", OUT_OF_MEMORY, first=2)
    refuse(simulator, "cuMemHostAlloc", OUT_OF_MEMORY)
    state = {"t": torch.zeros(2 * MIB, device=cuda)}
    dcp_fast.load(state, storage_reader=fast_reader(path, block_bytes=MIB, threads=4))
    simulator.reset()
    assert (state["t"] == 1).all()
    report = dcp_fast.last_report()
    assert report is not None
    assert MIB <= report.pinned_bytes < 2 * MIB
    assert report.device_fallback_items == 0


@pytest.mark.parametrize("number", [NO_BINARY, NO_COMPILER, OUT_OF_MEMORY])
def test_no_kernel(
    cuda: torch.device, stored: Path, simulator: Simulator, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(simulator, "cuModuleLoadData", number)
    report = loaded(stored, cuda)
    assert report.device_fallback_items == 3
    assert "cuModuleLoadData failed" in report.device_fallback_reason
    assert len(warnings_of(caplog)) == 1
    simulator.reset()


def test_boxes_of_hooked_planners(cuda: torch.device, stored: Path, simulator: Simulator) -> None:
    class Planner(dcp_fast.DefaultLoadPlanner):
        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            pass

    refuse(simulator, "cuModuleLoadData", NO_COMPILER)
    state = state_on(cuda)
    dcp_fast.load(state, storage_reader=fast_reader(stored), planner=Planner())
    assert_right(state)
    simulator.reset()


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute"])
def test_conversions_on_two_devices(
    two_devices: tuple[torch.device, torch.device], tmp_path: Path, simulator: Simulator, function: str
) -> None:
    """One device after the other is found out. Small tensors need the kernel."""
    stored = {f"t{i}": fill((30, 20), torch.float32, i) for i in range(16)}
    path = save(tmp_path / "two", stored)
    refuse(simulator, function, NO_BINARY)
    state = {f"t{i}": torch.zeros(30, 20, dtype=torch.bfloat16, device=two_devices[i % 2]) for i in range(16)}
    dcp_fast.load(state, storage_reader=fast_reader(path))
    simulator.reset()
    for name, value in stored.items():
        assert bits(state[name]) == bits(value.to(torch.bfloat16))
    report = dcp_fast.last_report()
    assert report is not None
    assert report.staged_items == report.device_fallback_items == 16
    assert report.bytes_needed == 16 * 30 * 20 * 4


def test_one_of_two_devices_has_no_kernel(
    two_devices: tuple[torch.device, torch.device],
    tmp_path: Path,
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = save(tmp_path / "two", {"large": LARGE, "small": SMALL})
    refuse(simulator, "cuModuleLoadData", NO_COMPILER)
    state = {
        "small": torch.zeros(5, 4, dtype=torch.int16, device=two_devices[0]).t(),
        "large": torch.zeros(600, 1000, device=two_devices[1]),
    }
    dcp_fast.load(state, storage_reader=fast_reader(path))
    simulator.reset()
    assert bits(state["large"]) == bits(LARGE)
    assert bits(state["small"]) == bits(SMALL)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.device_fallback_items == 1
    assert report.device_copies > 0
    assert len(warnings_of(caplog)) == 1
    assert "cuda:0" in warnings_of(caplog)[0]


# Preparing


def test_prepared_loads_neither_pin_nor_compile(cuda: torch.device, stored: Path, simulator: Simulator) -> None:
    dcp_fast.prepare_staging([0])
    made = ("cuMemHostRegister_v2", "cuModuleLoadData", "cuStreamCreate")
    before = [simulator.calls(name) for name in made]
    report = loaded(stored, cuda)
    assert [simulator.calls(name) for name in made] == before
    assert report.launches > 0


@pytest.mark.parametrize("devices", [None, [torch.device("cuda")], [torch.device("cuda", 0)]])
def test_devices_to_prepare(cuda: torch.device, simulator: Simulator, devices: Any) -> None:
    before = simulator.calls("cuMemHostRegister_v2")
    dcp_fast.prepare_staging(devices, pinned_bytes=5 * MIB, block_bytes=MIB)
    assert simulator.calls("cuMemHostRegister_v2") == before + 4  # slots of a MiB, with room for descriptors


def test_preparing_where_the_driver_refuses(
    cuda: torch.device, stored: Path, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(simulator, "cuModuleLoadData", NO_COMPILER)
    dcp_fast.prepare_staging([0])
    assert len(warnings_of(caplog)) == 1
    simulator.reset()
    assert loaded(stored, cuda).device_fallback_items == 3
    dcp_fast.prepare_staging([0])  # asks anew
    assert loaded(stored, cuda).device_fallback_items == 0


def test_preparing_a_device_that_does_not_exist(cuda: torch.device, simulator: Simulator) -> None:
    with pytest.raises(dcp_fast.CudaError, match="cuda:99: cuDeviceGet failed"):
        dcp_fast.prepare_staging([99])


# CUDA graphs


def test_a_stream_under_capture(cuda: torch.device, stored: Path, simulator: Simulator) -> None:
    state = state_on(cuda)
    calls = ("cuEventRecord", "cuMemcpyHtoDAsync_v2", "cuEventQuery", "cuStreamSynchronize", "cuMemHostRegister_v2")
    before = [simulator.calls(name) for name in calls]
    simulator.set("capturing", 1)
    error = fast_error(stored, state)
    simulator.set("capturing", 0)
    assert isinstance(error, dcp_fast.CudaError)
    assert "captured into a CUDA graph" in str(error)
    assert [simulator.calls(name) for name in calls] == before
    assert not state["large"].any()
    assert fast_error(stored, state) is None
    assert_right(state)
