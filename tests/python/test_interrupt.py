"""Ctrl-C ends a load soon, nothing spins meanwhile, and a forked process can load."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import (
    STATE,
    Child,
    fast_error,
    legacy_record,
    open_files,
    replace_record,
    run_child,
    save_state,
    threads,
    threads_vanish,
    wanted,
)
from helpers import Entry, fill, write_checkpoint

from dcp_fast import _native

COUNT = 16 << 20  # elements of the large tensor
BLOCK = 1 << 18  # a thread finishes the block that it is at

CASES: dict[str, dict[str, Any]] = {
    "direct": {"threads": 4, "io": "cached", "block_bytes": BLOCK},
    "one thread": {"threads": 1, "io": "cached", "block_bytes": BLOCK},
    "past the page cache": {"threads": 4, "io": "direct", "block_bytes": BLOCK},
    "converted": {"threads": 4, "io": "cached", "block_bytes": BLOCK},
    "bytes": {},
    "legacy": {},
    "many records": {"threads": 1, "io": "cached"},
}


def write(path: Path, case: str) -> None:
    tensor = torch.zeros(COUNT)
    if case == "bytes":
        write_checkpoint(path, {"x": Entry(value=bytes(4 * COUNT))})
    elif case == "many records":
        write_checkpoint(path, {f"x{number}": Entry.of(torch.zeros(5000)) for number in range(3000)})
    else:
        write_checkpoint(path, {"x": Entry.of(tensor)})
    if case == "legacy":
        replace_record(path, "x", legacy_record(tensor))


def state_for(case: str) -> dict[str, Any]:
    if case == "many records":
        return {f"x{number}": torch.zeros(5000) for number in range(3000)}
    dtype = torch.bfloat16 if case == "converted" else torch.float32
    return {"x": None if case == "bytes" else torch.zeros(COUNT, dtype=dtype)}


def _slow_load(report: Callable[[Any], None], path: Path, case: str, short: int) -> dict[str, Any]:
    """Load at a few megabytes a second: every read is short."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    state = state_for(case)
    files, before = open_files(), threads()
    facts: dict[str, Any] = {}
    try:
        with _native.FaultInjection("pread", nth=0, short_bytes=short, repeat=1 << 60) as faults:
            report("loading")
            try:
                error = fast_error(path, state, **CASES[case])
            finally:
                facts["bytes read"] = faults.calls * short
    except KeyboardInterrupt as interrupt:
        error = interrupt
    facts["error"] = type(error).__name__
    facts["files"] = open_files() - files
    facts["threads"] = threads_vanish(before)
    facts["again"] = repr(fast_error(path, state, **CASES[case]))
    return facts


@pytest.mark.parametrize("case", CASES)
def test_ctrl_c(tmp_path: Path, case: str) -> None:
    write(tmp_path, case)
    with Child(_slow_load, tmp_path, case, 4) as child:
        assert child.next(60) == "loading"
        time.sleep(0.5)
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGINT)
        facts = child.next(300)
        assert facts["error"] == "KeyboardInterrupt", "the load was not slow enough, or swallowed it"
        assert facts["files"] == 0
        assert facts["threads"]
        assert facts["again"] == "None"
        # Not by the clock: a busy machine takes its time for anything.
        assert 0 < facts["bytes read"] < 0.6 * sum(file.stat().st_size for file in tmp_path.glob("*.distcp"))
        assert child.close() == 0


def _used(report: Callable[[Any], None], path: Path, case: str, short: int, count: int) -> tuple[float, float, float]:
    """Seconds that a slow load takes: by the clock, of processors, of the processor in the calling thread."""
    state = state_for(case)
    with _native.FaultInjection("pread", nth=0, short_bytes=short, repeat=1 << 60):
        clock, all_threads, this_thread = time.monotonic(), time.process_time(), time.thread_time()
        assert fast_error(path, state, threads=count, io="cached") is None
        return time.monotonic() - clock, time.process_time() - all_threads, time.thread_time() - this_thread


@pytest.mark.parametrize("case", ["direct", "converted"])
def test_nobody_spins(tmp_path: Path, case: str) -> None:
    """Readers are busy; whoever waits for them does nothing."""
    write(tmp_path, case)
    clock, process, _ = run_child(_used, tmp_path, case, 64, 1)
    assert process > 0.1
    assert process < 1.2 * clock
    clock, process, caller = run_child(_used, tmp_path, case, 64, 2)
    assert process > 0.1
    assert caller < 0.3 * clock


# Processes


def _load_in_fork(report: Callable[[Any], None], path: Path) -> list[int]:
    """Exit codes of forked processes that load after, and while, their parent did."""

    def load() -> bool:
        state = wanted()
        return fast_error(path, state, threads=4) is None and state["half"].view(torch.int16).equal(
            STATE["half"].view(torch.int16)
        )

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if load() else 2
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    codes = [fork()]
    assert load()
    codes.append(fork())
    with _native.FaultInjection("pread", nth=3, error_number=5):
        assert not load()
    codes.append(fork())
    assert load()
    return codes


def test_fork(tmp_path: Path) -> None:
    save_state(tmp_path)
    assert run_child(_load_in_fork, tmp_path) == [0, 0, 0]


def _few_descriptors(report: Callable[[Any], None], path: Path, names: list[str]) -> BaseException | None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 20, 1 << 12))
    return fast_error(path, {name: torch.zeros(3, 5) for name in names}, threads=8)


def test_more_files_than_descriptors(tmp_path: Path) -> None:
    names = [f"x{number}" for number in range(200)]
    write_checkpoint(tmp_path, {name: Entry.of(fill((3, 5), torch.float32), file=f"{name}.distcp") for name in names})
    assert run_child(_few_descriptors, tmp_path, names) is None
