"""Fixtures of the tests that need CUDA devices: real ones, or those of the simulated driver.

The same tests run on a real GPU, if torch finds one and DCP_FAST_LIBCUDA is unset, and on the simulator, if
DCP_FAST_LIBCUDA names it. Otherwise they are skipped, for a reason that says what is missing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import SIMULATED, use_devices
from simulated_cuda import torch_backend
from simulated_cuda.control import Simulator

import dcp_fast

_FOLDER = Path(__file__).parent


def _what_is_missing() -> str | None:
    if SIMULATED:
        return torch_backend.why_not()
    if not torch.cuda.is_available():
        return "needs a GPU, or the simulated driver in DCP_FAST_LIBCUDA"
    return None


def pytest_configure() -> None:
    # Before any test module is imported: what it imports may look for devices.
    if torch_backend.why_not() is None:
        use_devices()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_seeded_bugs.py")  # the longest test by far begins first
    reason = _what_is_missing()
    for item in items:
        if reason is not None and _FOLDER in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def two_devices() -> tuple[torch.device, torch.device]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    return torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def simulator() -> Simulator:
    if not SIMULATED:
        pytest.skip("asks the simulated driver")
    return Simulator()


@pytest.fixture
def slow_copies() -> Iterator[None]:
    """Copies take long enough that work which does not wait for them comes too early."""
    if not SIMULATED:
        yield  # they take what they take
        return
    simulator = Simulator()
    simulator.set("copy_gbps", 0.02)
    yield
    simulator.set("copy_gbps", 0)


@pytest.fixture(autouse=True)
def nothing_to_report() -> Iterator[None]:
    """The simulated driver finds fault with nothing that a test does, and nothing that it makes stays behind.

    A test that expects reports takes them with `simulator.reports(clear=True)`.
    """
    if not SIMULATED:
        yield
        return
    simulator = Simulator()
    before = _left_behind(simulator)
    yield
    reports = simulator.reports(clear=True)
    simulator.reset()  # errors that a test provoked would fail the calls below
    after = _left_behind(simulator)
    if after > before:  # what cycles hold on to is not left behind; to look for them takes long
        gc.collect()
        after = _left_behind(simulator)
    assert not reports
    assert after <= before, simulator.leaks()


def _left_behind(simulator: Simulator) -> int:
    """How many objects of the driver are alive, but for those that torch and dcp_fast keep."""
    dcp_fast.release_staging()
    backend = torch_backend.install()
    for device in range(torch.cuda.device_count()):
        if backend.has_context(device):
            torch.cuda.synchronize(device)
    return sum(simulator.leaks().values()) - backend.kept_objects()
