"""Loads to CUDA devices in processes of their own: what they touch and when, the driver, forks, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Child, fast_error, run_child, threads, threads_vanish
from helpers import save
from processes import use_devices
from simulated_cuda import torch_backend
from simulated_cuda.control import Simulator

import dcp_fast

MIB = 1 << 20
TIMEOUT = 120.0  # a child may have to wait for its turn on a busy machine


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "stored", {"t": torch.arange(3000.0).view(60, 50)})


def loads(path: Path, device: str, **options: Any) -> bool:
    state = {"t": torch.zeros(60, 50, device=device)}
    return fast_error(path, state, **options) is None and torch.equal(state["t"].cpu().view(-1), torch.arange(3000.0))


def _calls(report: Callable[[Any], None], path: Path) -> list[int]:
    simulator = Simulator()
    calls = [simulator.calls()]
    assert loads(path, "cpu")
    dcp_fast.release_staging()
    calls.append(simulator.calls())
    use_devices()
    assert loads(path, "cuda")
    calls.append(simulator.calls())
    return calls


def test_no_driver_without_destinations_on_devices(stored: Path, simulator: Simulator) -> None:
    at_import, after_a_host_load, after_a_device_load = run_child(_calls, stored, timeout=TIMEOUT)
    assert at_import == after_a_host_load == 0
    assert after_a_device_load > 0


def _contexts(report: Callable[[Any], None], path: Path, device: int) -> tuple[list[bool], int]:
    """On which devices torch has a context after a load, and how many the load added to torch's."""
    use_devices()
    simulator = Simulator()
    state = {"t": torch.zeros(60, 50, device=f"cuda:{device}")}
    before = simulator.leaks()["contexts"]
    assert fast_error(path, state) is None
    return [torch_backend.install().has_context(i) for i in range(2)], simulator.leaks()["contexts"] - before


@pytest.mark.parametrize("device", [0, 1])
def test_no_context_on_other_devices(
    two_devices: tuple[torch.device, torch.device], stored: Path, simulator: Simulator, device: int
) -> None:
    contexts, added = run_child(_contexts, stored, device, timeout=TIMEOUT)
    assert contexts == [device == 0, device == 1]
    assert added == 1  # another reference to the one that torch has


@pytest.mark.parametrize(
    ("library", "reason"),
    [("/nowhere/libcuda.so.1", "the CUDA driver cannot be loaded"), ("libm.so.6", "lacks a call")],
)
def test_missing_driver(stored: Path, simulator: Simulator, library: str, reason: str) -> None:
    """Torch has its own way to the driver."""
    error = run_child(_load_without_driver, stored, library, timeout=TIMEOUT)
    assert type(error) is dcp_fast.CudaError
    assert reason in str(error)
    assert library in str(error)


def _load_without_driver(report: Callable[[Any], None], path: Path, library: str) -> BaseException | None:
    use_devices()
    state = {"t": torch.zeros(60, 50, device="cuda")}
    os.environ["DCP_FAST_LIBCUDA"] = library
    assert loads(path, "cpu")
    return fast_error(path, state)


# Forks


def forked(function: Callable[[], bool]) -> int:
    """The exit code of a fork that returns whether the function did, and ends as Python programs do."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            try:
                sys.exit(code)
            except SystemExit:
                dcp_fast.release_staging()  # as at exit
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _forks(report: Callable[[Any], None], path: Path) -> list[int]:
    use_devices()
    codes = [forked(lambda: loads(path, "cuda") and loads(path, "cpu"))]
    assert loads(path, "cuda")
    # A process that has used a device cannot hand it on: its children load into host memory.
    codes.append(forked(lambda: loads(path, "cpu")))
    assert loads(path, "cuda", synchronize=False)
    codes.append(forked(lambda: loads(path, "cpu")))
    assert loads(path, "cuda")
    return codes


def test_fork(cuda: torch.device, stored: Path) -> None:
    assert run_child(_forks, stored, timeout=TIMEOUT) == [0, 0, 0]


def _inherited(report: Callable[[Any], None], path: Path) -> int:
    use_devices()
    state = {"t": torch.zeros(60, 50, device="cuda")}
    assert fast_error(path, state) is None
    return forked(lambda: isinstance(fast_error(path, state), RuntimeError))


def test_destinations_from_before_a_fork(cuda: torch.device, stored: Path) -> None:
    assert run_child(_inherited, stored, timeout=TIMEOUT) == 0


# Ctrl-C


def _slow_load(report: Callable[[Any], None], path: Path, dtype: torch.dtype) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    use_devices()
    simulator = Simulator()
    state = {"t": torch.zeros(6 * MIB, dtype=dtype, device="cuda")}
    limits = {"pinned_bytes": MIB, "device_staging_bytes": MIB}
    assert fast_error(path, state, **limits) is None
    state["t"].cpu()
    dcp_fast.release_staging()
    before = threads()  # with those of the simulator and of torch
    state["t"].zero_()
    torch.cuda.synchronize()
    simulator.set("copy_gbps", 0.004)  # six seconds
    facts: dict[str, Any] = {}
    try:
        report("loading")
        error = fast_error(path, state, **limits)  # torch wraps an interrupt of a load
    except KeyboardInterrupt as interrupt:
        error = interrupt
    report(type(error).__name__)
    simulator.set("copy_gbps", 0)
    image = state["t"].cpu()
    facts["threads"] = threads_vanish(before)
    facts["reports"] = simulator.reports()
    facts["same"] = torch.equal(state["t"].cpu(), image)
    facts["loaded in part"] = 0 < int(image.count_nonzero()) < image.numel()
    facts["again"] = repr(fast_error(path, state, **limits))
    facts["loaded"] = bool((state["t"] == 1).all())
    return facts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrl_c(tmp_path: Path, simulator: Simulator, dtype: torch.dtype) -> None:
    save(tmp_path, {"t": torch.ones(6 * MIB)})
    with Child(_slow_load, tmp_path, dtype) as child:
        assert child.next(TIMEOUT) == "loading"
        time.sleep(1.5)
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGINT)
        started = time.monotonic()
        assert child.next(TIMEOUT) == "KeyboardInterrupt"
        # What is under way ends: as much as fits in pinned memory, a quarter of a second here.
        assert time.monotonic() - started < 2
        facts = child.next(TIMEOUT)
    assert facts.pop("again") == "None"
    assert facts.pop("reports") == []
    assert all(facts.values()), facts
