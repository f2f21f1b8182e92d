"""Every system call of a load fails once: the load ends with the right data or a typed error, and leaves nothing."""

from __future__ import annotations

import errno
import gc
import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import (
    assert_facts,
    by_offset,
    check,
    fast_error,
    limited,
    metadata_calls,
    open_files,
    replace_record,
    save_state,
    set_storage,
    span,
    threads,
    threads_vanish,
    wanted,
)
from helpers import Entry, ShardedBuffer, fill, write_checkpoint

import dcp_fast
from dcp_fast import _native
from dcp_fast.errors import LoadError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_state(tmp_path / "checkpoint")


# Files that are not what they should be


def replace_file(checkpoint: Path, kind: str) -> None:
    path = span(checkpoint, "large").path
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to(checkpoint / "nowhere")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("kind", "expected", "number"),
    [
        ("missing", dcp_fast.FileMissingError, errno.ENOENT),
        ("dangling link", dcp_fast.FileMissingError, errno.ENOENT),
        ("directory", dcp_fast.NotAFileError, errno.EISDIR),
        ("loop", dcp_fast.FileAccessError, errno.ELOOP),
        ("socket", dcp_fast.FileAccessError, errno.ENXIO),
    ],
)
def test_no_file(checkpoint: Path, kind: str, expected: type[LoadError], number: int) -> None:
    (fqn, first), *_ = by_offset(checkpoint)
    replace_file(checkpoint, kind)
    check(checkpoint, expected, fqn, within=first)
    assert_errno(fast_error(checkpoint, wanted()), number, first.path)


def test_pipe_in_place_of_a_file(checkpoint: Path) -> None:
    """torch waits forever for somebody to write to it."""
    (fqn, first), *_ = by_offset(checkpoint)
    replace_file(checkpoint, "pipe")
    with limited(20):
        error = fast_error(checkpoint, wanted())
    assert_facts(error, dcp_fast.FileAccessError, first.path, fqn, first)
    assert_errno(error, errno.EINVAL, first.path)


@pytest.mark.parametrize("name", ["__0_0.distcp/inner", "x" * 300, "nowhere/x.distcp", "../x.distcp", "/x.distcp", ""])
def test_impossible_file_name(checkpoint: Path, name: str) -> None:
    set_storage(checkpoint, "large", relative_path=name)
    check(checkpoint, type(fast_error(checkpoint, wanted())), "large", path=os.path.join(checkpoint, name))


def assert_errno(error: BaseException | None, number: int, path: Path) -> None:
    assert isinstance(error, OSError)
    assert isinstance(error, dcp_fast.FileAccessError)
    assert (error.errno, error.error_number, error.filename) == (number, number, str(path))
    assert error.strerror == os.strerror(number)


@pytest.mark.parametrize("function", ["open", "fstat", "pread"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EIO, dcp_fast.FileAccessError),
        (errno.EACCES, dcp_fast.FilePermissionError),
        (errno.EPERM, dcp_fast.FilePermissionError),
        (errno.ENOENT, dcp_fast.FileMissingError),
        (errno.EISDIR, dcp_fast.NotAFileError),
        (errno.ESTALE, dcp_fast.FileAccessError),
        (errno.EMFILE, dcp_fast.FileAccessError),
        (errno.ETIMEDOUT, dcp_fast.FileAccessError),
        (errno.ENOTDIR, dcp_fast.FileAccessError),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) else "",
)
def test_failing_system_call(checkpoint: Path, function: str, number: int, expected: type[LoadError]) -> None:
    """The class is the one that Python itself chooses for the number, which is what torch raises."""
    with _native.FaultInjection(function, nth=metadata_calls(checkpoint, function), error_number=number):
        error = fast_error(checkpoint, {"large": torch.zeros(300, 100)})
    assert isinstance(error, expected)
    assert_facts(error, type(error), span(checkpoint, "large").path, "large", span(checkpoint, "large"))
    assert_errno(error, number, span(checkpoint, "large").path)
    assert isinstance(error, type(OSError(number, "")))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ENOMEM], ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["open", "fstat", "pread"])
def test_metadata_that_cannot_be_read(checkpoint: Path, function: str, number: int) -> None:
    """torch's load raises an AssertionError, which says that there is none for the rank alone either."""
    with _native.FaultInjection(function, nth=0, error_number=number):
        error = fast_error(checkpoint, {"large": torch.zeros(300, 100)})
    expected = dcp_fast.OutOfMemoryError if number == errno.ENOMEM else dcp_fast.MetadataAccessError
    assert type(error) is expected
    assert (error.error_number, error.path) == (number, str(checkpoint / ".metadata"))


@pytest.mark.parametrize("function", ["open", "fstat", "pread"])
def test_system_out_of_memory(checkpoint: Path, function: str) -> None:
    with _native.FaultInjection(function, nth=metadata_calls(checkpoint, function), error_number=errno.ENOMEM):
        error = fast_error(checkpoint, {"large": torch.zeros(300, 100)})
    assert_facts(error, dcp_fast.OutOfMemoryError, span(checkpoint, "large").path, "large", span(checkpoint, "large"))
    assert isinstance(error, MemoryError)


@pytest.mark.parametrize("fqn", ["large", "value.step"])
def test_file_ends_while_it_is_read(checkpoint: Path, fqn: str) -> None:
    state = wanted() if fqn == "value.step" else {"large": torch.zeros(300, 100)}
    with _native.FaultInjection("pread", nth=-1) as counter:
        assert fast_error(checkpoint, state) is None
    with _native.FaultInjection("pread", nth=counter.calls - 1, short_bytes=0):
        error = fast_error(checkpoint, state, threads=1)
    assert_facts(error, dcp_fast.TruncatedFileError, span(checkpoint, fqn).path, fqn, span(checkpoint, fqn))


# A sweep over all calls of a load


LARGE = fill((256, 512), torch.float32, 7)  # half a megabyte: eight blocks of the smallest size
HALF = fill((256, 512), torch.float16, 8)
SMALL = [fill((5, 3), torch.float32, number) for number in range(6)]
SETTINGS = [
    {"io": mode, "threads": count, "block_bytes": 1 << 16} for mode in ("cached", "direct", "auto") for count in (1, 4)
]
# Invisible: EINTR and short reads. The others end the load, unless they hit a call that is only an optimisation.
RETRIED = [{"error_number": errno.EINTR}, {"short_bytes": 1}, {"short_bytes": 4095}, {"short_bytes": 4096}]
FATAL = [errno.EIO, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EMFILE]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several files with all that is read in some way of its own."""
    zstandard = pytest.importorskip("zstandard")
    entries: dict[str, Any] = {
        "direct": Entry.of(LARGE, file="a.distcp"),
        "columns": Entry.of(LARGE, file="b.distcp"),
        "converted": Entry.of(HALF, file="b.distcp"),
        "legacy": Entry.of(HALF[:9], file="c.distcp", legacy=True),
        "zstd": Entry.of(SMALL[0], file="c.distcp"),
        "value": Entry(value={"step": 5}, file="c.distcp"),
    }
    entries |= {f"small{number}": Entry.of(tensor, file="d.distcp") for number, tensor in enumerate(SMALL)}
    path = write_checkpoint(tmp_path_factory.mktemp("everything"), entries)
    stream = io.BytesIO()
    torch.save(SMALL[0], stream)
    replace_record(path, "zstd", zstandard.ZstdCompressor().compress(stream.getvalue()))
    set_storage(path, "zstd", transform_descriptors=["stream.zstd/1"])
    return path


class Wanted:
    """What to load from that checkpoint, and what must then be in it."""

    def __init__(self) -> None:
        self.columns = torch.zeros(256, 40)
        self.state: dict[str, Any] = {
            "direct": torch.zeros(256, 512),
            "columns": ShardedBuffer.make((256, 512), [(0, 100)], [self.columns]),
            "converted": torch.zeros(256, 512, dtype=torch.float64),
            "legacy": torch.zeros(9, 512, dtype=torch.float16),
            "zstd": torch.zeros(5, 3),
            "value": None,
        }
        self.state |= {f"small{number}": torch.zeros(5, 3) for number in range(len(SMALL))}

    def assert_loaded(self) -> None:
        state = self.state
        assert state["value"] == {"step": 5}
        converted = state["converted"].nan_to_num(), HALF.double().nan_to_num()
        pairs = [(state["direct"], LARGE), (self.columns, LARGE[:, 100:140]), (state["legacy"], HALF[:9]), converted]
        pairs += [(state[f"small{number}"], tensor) for number, tensor in enumerate(SMALL)] + [
            (state["zstd"], SMALL[0])
        ]
        for actual, expected in pairs:
            assert torch.equal(actual.view(torch.uint8), expected.contiguous().view(torch.uint8))


def count_calls(path: Path, function: str, settings: dict[str, Any]) -> int:
    todo = Wanted()
    with _native.FaultInjection(function, nth=-1) as counter:
        assert fast_error(path, todo.state, **settings) is None
    todo.assert_loaded()
    return counter.calls


def sweep(path: Path, function: str, settings: dict[str, Any], most: int, **fault: Any) -> Iterator[tuple[int, Any]]:
    """Load with the fault in every call, or in `most` of them: (number of the call, the error or None).

    Whatever the outcome, nothing hangs and nothing is left behind, and a load without an error loads the right data.
    """
    calls = count_calls(path, function, settings)
    assert calls >= 4
    gc.collect()  # else what tests before this one left closes its files meanwhile
    files, before = open_files(), threads()
    for nth in range(0, calls, -(-calls // most)):
        todo = Wanted()
        with limited(30), _native.FaultInjection(function, nth=nth, **fault) as injected:
            error = fast_error(path, todo.state, **settings)
        assert gc.isenabled()
        assert open_files() == files, f"call {nth} leaves descriptors open"
        assert threads_vanish(before), f"call {nth} leaves threads behind"
        if error is None:
            todo.assert_loaded()
        else:
            assert isinstance(error, LoadError), f"call {nth}: {error!r}"
            assert os.path.dirname(error.path) == str(path)
            if not error.path.endswith(".metadata"):
                assert error.fqn in todo.state
                assert error.offset is not None, f"call {nth}: {error}"
                assert error.length is not None
        # Threads share open files, so that one load may need fewer calls than another: then nothing failed.
        assert injected.calls > nth or error is None
        if injected.calls > nth:
            yield nth, error
    count_calls(path, function, settings)


@pytest.fixture(params=[10, pytest.param(1 << 30, marks=pytest.mark.long)], ids=["some", "all"])
def most(request: pytest.FixtureRequest) -> int:
    """How many calls a sweep hits."""
    return int(request.param)


@pytest.fixture(params=SETTINGS, ids=lambda settings: f"{settings['io']}-{settings['threads']}")
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.mark.parametrize(
    ("function", "fault"),
    [(name, RETRIED[0]) for name in ("open", "fstat", "close")] + [("pread", fault) for fault in RETRIED],
    ids=str,
)
def test_interrupted_and_short_calls_are_invisible(
    everything: Path, function: str, fault: dict[str, int], settings: dict[str, Any], most: int
) -> None:
    for nth, error in sweep(everything, function, settings, most, **fault):
        assert error is None, f"call {nth}: {error!r}"


@pytest.mark.parametrize("fault", RETRIED, ids=str)
def test_all_calls_interrupted_or_short(everything: Path, fault: dict[str, int], settings: dict[str, Any]) -> None:
    todo = Wanted()
    repeat = 50 if "error_number" in fault else 1 << 60  # a call that is always interrupted never ends
    with limited(60), _native.FaultInjection("pread", nth=0, repeat=repeat, **fault) as injected:
        assert fast_error(everything, todo.state, **settings) is None
    assert injected.calls > 50
    todo.assert_loaded()


@pytest.mark.parametrize("number", FATAL, ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["open", "fstat", "pread"])
def test_failing_calls(everything: Path, function: str, number: int, settings: dict[str, Any], most: int) -> None:
    if number != errno.EIO:
        most = -(-most // 3)
    hit = 0
    for nth, error in sweep(everything, function, settings, most, error_number=number):
        if error is None:
            # The descriptors for probing and for direct reads: reading through the page cache works without.
            assert function == "open", f"call {nth} is ignored"
            assert settings["io"] != "cached"
            continue
        hit += 1
        assert error.error_number == number
        assert isinstance(error, MemoryError if number == errno.ENOMEM else OSError)
    assert hit > 0


@pytest.mark.parametrize("number", [errno.EINTR, *FATAL], ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["pread_nowait", "close"])
def test_failing_calls_that_do_not_matter(everything: Path, function: str, number: int, most: int) -> None:
    settings = {"io": "auto", "threads": 2, "block_bytes": 1 << 16}
    for nth, error in sweep(everything, function, settings, most, error_number=number):
        assert error is None, f"call {nth}: {error!r}"


def test_reads_that_find_the_end(everything: Path, settings: dict[str, Any], most: int) -> None:
    hit = 0
    for nth, error in sweep(everything, "pread", settings, 4 * most, short_bytes=0):
        if error is None:
            assert settings["io"] != "cached", f"call {nth} is ignored"
            continue
        hit += 1
        is_metadata = error.path.endswith(".metadata")
        assert type(error) is (dcp_fast.CorruptMetadataError if is_metadata else dcp_fast.TruncatedFileError)
    assert hit > 0


def test_short_and_unaligned_direct_reads(everything: Path) -> None:
    for short in (1, 511, 4096, 5000):
        for _, error in sweep(everything, "pread", {"io": "direct", "threads": 2}, 10, short_bytes=short, repeat=3):
            assert error is None


@pytest.mark.parametrize("count", [1, 4])
def test_the_first_error_cancels_the_rest(tmp_path: Path, count: int) -> None:
    """Each thread finishes the block that it is at. Throwing takes a moment, in which the others may go on."""
    elements = 16 << 20
    path = write_checkpoint(tmp_path, {"x": Entry.of(torch.zeros(elements))})
    settings: dict[str, Any] = {"threads": count, "block_bytes": 1 << 16, "io": "cached"}
    with _native.FaultInjection("pread", nth=-1) as whole:
        assert fast_error(path, {"x": torch.zeros(elements)}, **settings) is None
    assert whole.calls >= 1024
    for nth in (0, 10, 100):
        enough = nth + (1 if count == 1 else whole.calls // 8)
        for _ in range(3):
            with _native.FaultInjection("pread", nth=nth, error_number=errno.EIO) as injected:
                error = fast_error(path, {"x": torch.zeros(elements)}, **settings)
            assert isinstance(error, OSError)
            if injected.calls <= enough:
                break
        assert nth < injected.calls <= enough


def test_too_few_descriptors_are_an_error_that_says_so(everything: Path) -> None:
    todo = Wanted()
    with _native.FaultInjection("open", nth=0, error_number=errno.EMFILE, repeat=1 << 60):
        error = fast_error(everything, todo.state)
    assert isinstance(error, dcp_fast.FileAccessError)
    assert error.errno == errno.EMFILE
