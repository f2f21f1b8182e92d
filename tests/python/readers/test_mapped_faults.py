"""Copies from mapped files: when there are some, what they count, and that no signal ends a load or is lost."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import random
import shutil
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Child, fast_error, limit_address_space, limited, run_child
from helpers import Entry, ShardedBuffer, fill, write_checkpoint

import dcp_fast
from dcp_fast import _native

# A megabyte each: several blocks of the size below.
STORED = {name: fill((512, 512), torch.float32, seed) for seed, name in enumerate(("a", "b", "c"))}
OPTIONS: dict[str, Any] = {"io": "mapped", "threads": 2, "block_bytes": 300_000}


def write(path: Path) -> Path:
    return write_checkpoint(path, {name: Entry.of(tensor) for name, tensor in STORED.items()})


def wanted() -> dict[str, Any]:
    return {name: torch.zeros(512, 512) for name in STORED}


def is_right(state: dict[str, Any]) -> bool:
    return all(torch.equal(state[name].view(torch.int32), STORED[name].view(torch.int32)) for name in STORED)


def report() -> dcp_fast.LoadReport:
    last = dcp_fast.last_report()
    assert last is not None
    return last


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint")


# When files are mapped


def test_what_is_cached_is_mapped(checkpoint: Path) -> None:
    state = wanted()
    assert fast_error(checkpoint, state) is None  # here temporary files are on a local file system
    assert is_right(state)
    assert report().bytes_mapped == report().bytes_needed == 3 << 20
    assert report().bytes_read < 1.01 * report().bytes_needed
    assert report().mapping_fallback_reason == ""
    for mode in ("cached", "direct"):
        assert fast_error(checkpoint, wanted(), io=mode) is None
        assert report().bytes_mapped == 0


def test_small_blocks_are_told_to_be_why_nothing_is_mapped(checkpoint: Path) -> None:
    state = wanted()
    assert fast_error(checkpoint, state, io="mapped", block_bytes=100_000) is None
    assert is_right(state)
    assert report().bytes_mapped == 0
    assert report().mapping_fallback_reason == "blocks of less than 256 KiB are read"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [9 << 10, 31 << 10, 33 << 10])
def test_gaps_that_no_request_reads_through(tmp_path: Path, gap: int, dtype: torch.dtype) -> None:
    row = (gap + 1024) // 4
    stored = fill((100, row), torch.float32, 1).nan_to_num()
    write_checkpoint(tmp_path, {"x": Entry.of(stored)})
    columns = torch.zeros(100, 256, dtype=dtype)
    state = {"x": ShardedBuffer.make((100, row), [(0, 64)], [columns])}
    assert fast_error(tmp_path, state, io="mapped") is None
    assert torch.equal(columns, stored[:, 64:320].to(dtype))
    assert report().bytes_mapped == (report().bytes_needed if gap <= 32 << 10 else 0)
    with _native.FaultInjection("map", nth=0, error_number=errno.ENOMEM, repeat=1 << 60):
        columns.zero_()
        assert fast_error(tmp_path, state, io="mapped") is None
    assert torch.equal(columns, stored[:, 64:320].to(dtype))
    assert report().bytes_mapped == 0
    assert report().bytes_read < 2 * report().bytes_needed  # a request for each run


def test_gaps_are_not_counted_as_read(checkpoint: Path) -> None:
    columns = torch.zeros(512, 64)
    state = {"b": ShardedBuffer.make((512, 512), [(0, 128)], [columns])}
    assert fast_error(checkpoint, state, io="mapped") is None
    assert torch.equal(columns.view(torch.int32), STORED["b"][:, 128:192].contiguous().view(torch.int32))
    assert report().bytes_mapped == report().bytes_needed == 512 * 64 * 4
    assert report().bytes_read < 1.1 * report().bytes_needed
    assert fast_error(checkpoint, state, io="cached") is None
    assert report().bytes_read > 7 * report().bytes_needed


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENODEV, errno.EACCES], ids=errno.errorcode.get)
def test_a_refused_mapping_is_told(checkpoint: Path, number: int) -> None:
    state = wanted()
    with _native.FaultInjection("map", nth=0, error_number=number, repeat=1 << 60) as faults:
        assert fast_error(checkpoint, state, **OPTIONS) is None
    assert faults.calls > 0
    assert is_right(state)
    assert report().bytes_mapped == 0
    assert report().mapping_fallback_reason == f"a file could not be mapped: {os.strerror(number)}"
    assert report().mapping_fallback_reason in str(report())


def _with_little_address_space(report_: Callable[[Any], None], path: Path) -> tuple[bool, int, str]:
    state = {"x": torch.zeros(10 << 20)}
    options: dict[str, Any] = {"threads": 1, "block_bytes": 64 << 20, "staging_bytes": 256 << 20}
    assert fast_error(path, state, io="cached", **options) is None
    state["x"].zero_()
    limit_address_space(20 << 20)
    assert fast_error(path, state, io="mapped", **options) is None
    return bool((state["x"] == 1).all()), report().bytes_mapped, report().mapping_fallback_reason


def test_no_address_space_is_left(tmp_path: Path) -> None:
    """There is room for all that a load takes but for a mapping of 40 megabytes."""
    write_checkpoint(tmp_path, {"x": Entry.of(torch.ones(10 << 20))})
    right, mapped, reason = run_child(_with_little_address_space, tmp_path)
    assert right
    assert mapped == 0
    assert os.strerror(errno.ENOMEM) in reason


def test_pages_that_cannot_be_read_are_read_again(checkpoint: Path) -> None:
    """As when a device fails for a moment."""
    state = wanted()
    with _native.FaultInjection("map", nth=0) as faults:
        assert fast_error(checkpoint, state, **OPTIONS) is None
    assert faults.calls > 1
    assert is_right(state)
    assert report().mapping_fallback_reason == "a mapped file changed or could not be read"
    assert 0 < report().bytes_mapped < report().bytes_needed


def test_a_thread_that_blocks_the_signal_maps_nothing(checkpoint: Path) -> None:
    state = wanted()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
    try:
        assert fast_error(checkpoint, state, **OPTIONS) is None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert is_right(state)
    assert report().bytes_mapped == 0
    assert "SIGBUS is blocked" in report().mapping_fallback_reason


# A file is cut short at any moment


def _truncate(report_: Callable[[Any], None], path: str, order: str) -> None:
    """Cut the file to a size after some time, both read from the order file, whenever there is a new order."""
    last = ""
    while True:
        content = Path(order).read_text()
        if content == last:
            time.sleep(0)
            continue
        last = content
        number, seconds, size = content.split()
        end = time.perf_counter() + float(seconds)
        while time.perf_counter() < end:
            pass
        os.truncate(path, int(size))
        report_(int(number))


@pytest.mark.parametrize("runs", [150, pytest.param(10_000, marks=pytest.mark.long)])
def test_another_process_cuts_a_file_short(checkpoint: Path, tmp_path: Path, runs: int) -> None:
    """Every load ends with the right data or with an error that says where. Another load meanwhile is not disturbed."""
    path = checkpoint / "__0_0.distcp"
    whole = tmp_path / "whole"
    shutil.copy(path, whole)
    other = write(tmp_path / "other")
    order, next_order = tmp_path / "order", tmp_path / "next order"
    order.write_text("")
    rng = random.Random(runs)
    stop = threading.Event()
    wrong: list[str] = []

    def load_the_other_one() -> None:
        while not stop.is_set():
            state = wanted()
            error = fast_error(other, state, **OPTIONS)
            if error is not None or not is_right(state):
                wrong.append(repr(error))

    thread = threading.Thread(target=load_the_other_one)
    before = sigbus()
    errors = 0
    with Child(_truncate, str(path), str(order)) as child:
        thread.start()
        try:
            seconds = 0.01
            for number in range(runs):
                shutil.copy(whole, path)
                state = wanted()
                next_order.write_text(f"{number} {rng.uniform(0, seconds)} {rng.randrange(whole.stat().st_size)}\n")
                next_order.replace(order)  # at once: no reader finds half of it
                start = time.perf_counter()
                with limited(60):
                    error = fast_error(checkpoint, state, **OPTIONS)
                seconds = 0.9 * seconds + 0.1 * (time.perf_counter() - start)
                if error is None:
                    assert is_right(state)
                else:
                    errors += 1
                    assert type(error) is dcp_fast.TruncatedFileError
                    assert error.path == str(path)
                    assert error.fqn in STORED
                    assert error.offset is not None
                    assert error.length is not None
                assert child.next(60) == number
        finally:
            stop.set()
            thread.join()
    assert wrong == []
    assert errors > runs // 20
    assert sigbus() == before


# Whose the signal is


def sigbus() -> tuple[int, int, int]:
    """What the system has for SIGBUS: the handler's address, the mask, the flags."""
    action = ctypes.create_string_buffer(256)
    assert ctypes.CDLL(None).sigaction(signal.SIGBUS, None, action) == 0
    handler, mask = struct.unpack_from("QQ", action, 0)  # as in glibc
    (flags,) = struct.unpack_from("I", action, 8 + 128)
    return handler, mask, flags & ~0x04000000  # which glibc adds to what it sets (SA_RESTORER)


class loading:  # noqa: N801
    """Loads in a thread all the time. What it gives tells how many have ended; all must end well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = 0
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.stop.is_set():
            state = wanted()
            error = fast_error(self.path, state, **OPTIONS)
            if error is not None or not is_right(state):
                self.wrong.append(repr(error))
            self.done += 1

    def __enter__(self) -> Callable[[], int]:
        self.thread.start()
        return lambda: self.done

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        assert self.wrong == []


def test_signals_that_are_sent_reach_pythons_handler(checkpoint: Path) -> None:
    received = []
    sent = 0
    previous = signal.signal(signal.SIGBUS, lambda number, frame: received.append(number))
    try:
        with loading(checkpoint) as done:
            while done() < 20:
                os.kill(os.getpid(), signal.SIGBUS)
                sent += 1
                while len(received) < sent:  # two that are pending are one
                    time.sleep(0)
    finally:
        signal.signal(signal.SIGBUS, previous)
    assert len(received) == sent > 20


def test_nothing_is_left_of_the_handler(checkpoint: Path) -> None:
    def load() -> None:
        before = sigbus()
        assert fast_error(checkpoint, wanted(), **OPTIONS) is None
        assert report().bytes_mapped > 0
        assert sigbus() == before

    enabled = faulthandler.is_enabled()
    try:
        faulthandler.disable()
        load()
        faulthandler.enable()
        load()
        previous = signal.signal(signal.SIGBUS, lambda *_: None)
        load()
        signal.signal(signal.SIGBUS, previous)
        load()
    finally:
        faulthandler.disable()
        if enabled:
            faulthandler.enable()


def _fork_meanwhile(report_: Callable[[Any], None], path: Path) -> list[int]:
    before = sigbus()
    codes = []
    with loading(path) as done:
        while done() < 2:
            time.sleep(0.001)
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    state = wanted()
                    if sigbus() != before:
                        code = 2
                    elif fast_error(path, state, **OPTIONS) is None and is_right(state) and report().bytes_mapped > 0:
                        code = 0 if sigbus() == before else 3
                finally:
                    os._exit(code)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


def test_a_child_that_was_forked_meanwhile_loads(checkpoint: Path) -> None:
    assert run_child(_fork_meanwhile, checkpoint) == [0] * 20


def _replaced_meanwhile(report_: Callable[[Any], None], path: Path) -> tuple[int, str, bool]:
    received: list[int] = []
    deadline = time.monotonic() + 30
    assert fast_error(path, wanted()) is None
    with loading(path):
        while not report().mapping_fallback_reason and time.monotonic() < deadline:
            signal.signal(signal.SIGBUS, lambda number, frame: received.append(number))
            ours = sigbus()
    stays = sigbus() == ours
    os.kill(os.getpid(), signal.SIGBUS)
    state = wanted()
    assert fast_error(path, state, **OPTIONS) is None
    assert is_right(state)
    return len(received), report().mapping_fallback_reason, stays


def test_a_handler_that_comes_meanwhile_stays(checkpoint: Path) -> None:
    received, reason, stays = run_child(_replaced_meanwhile, checkpoint)
    assert received == 1
    assert reason == "another library took over SIGBUS during a load"
    assert stays


def _die(report_: Callable[[Any], None], path: Path, how: str, stderr: str) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.disable()
    if how.startswith("faulthandler"):
        faulthandler.enable()
    if how.startswith("data loader"):
        torch._C._set_worker_signal_handlers()
    with loading(path) as done:
        while done() < 5:
            time.sleep(0.001)
        if how.endswith("sent"):
            os.kill(os.getpid(), signal.SIGBUS)
        else:
            with tempfile.TemporaryFile() as file:
                file.truncate(4096)
                pages = mmap.mmap(file.fileno(), 4096)
                file.truncate(0)
                pages[100]
        time.sleep(60)


@pytest.mark.parametrize("kind", ["sent", "fault"])
@pytest.mark.parametrize(
    ("who", "says"),
    [("nobody", ""), ("faulthandler", "Fatal Python error: Bus error"), ("data loader", "shared memory")],
)
def test_others_have_the_last_word(checkpoint: Path, tmp_path: Path, who: str, says: str, kind: str) -> None:
    """What ends a process ends it while dcp_fast loads too, and whoever wants to say something about it does."""
    stderr = tmp_path / "stderr"
    with Child(_die, checkpoint, f"{who} {kind}", str(stderr)) as child:
        with pytest.raises(EOFError):
            child.next(60)
        child.process.join(10)
        assert child.process.exitcode == -signal.SIGBUS
    assert says in stderr.read_text()
