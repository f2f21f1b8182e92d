"""What the error tests share: damage to checkpoints, the errors that come of it, and limits that a load must keep."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import os
import pickle
import resource
import signal
import struct
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from forks import FORKS
from helpers import fast_reader, fill, load_with, save, torch_load, torch_planner, torch_reader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

import dcp_fast
from dcp_fast import _native
from dcp_fast.errors import LoadError

# The errors of a load


def _only_error(errors: Mapping[int, BaseException] | None) -> BaseException | None:
    return None if errors is None else next(iter(errors.values()))


def fast_error(path: Path, state: dict[str, Any], **options: Any) -> BaseException | None:
    """What dcp_fast raises for a load."""
    reader = fast_reader(path, **options)
    return _only_error(load_with(dcp_fast.load, state, storage_reader=reader, no_dist=True).errors)


def metadata_calls(path: Path, function: str) -> int:
    """How many calls come before those that read data."""
    with _native.FaultInjection(function, nth=-1) as counter:
        fast_reader(path).read_metadata()
    assert counter.calls > 0
    return counter.calls


def torch_error(path: Path, state: dict[str, Any]) -> BaseException | None:
    """What torch raises for a load."""
    arguments = {"storage_reader": torch_reader(path), "planner": torch_planner(), "no_dist": True}
    return _only_error(load_with(torch_load, state, **arguments).errors)


def zeros_like(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the same shape for a load to fill."""
    return {key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None for key, value in state.items()}


# The checkpoint that most tests damage

STATE: dict[str, Any] = {
    "small": fill((4, 4), torch.float32, 1),
    "half": fill((6, 5), torch.bfloat16, 2),
    "large": fill((300, 100), torch.float32, 3),
    "value": {"step": 5},
}
# What unpickling damage happens to stumble upon in torch; no code can rely on one of them.
ACCIDENTS = (IndexError, KeyError, ValueError, TypeError, AttributeError)


def save_state(path: Path, **options: Any) -> Path:
    return save(path, STATE, **options)


def wanted() -> dict[str, Any]:
    """A state dict to load ``STATE`` into."""
    return zeros_like(STATE) | {"value": {"step": 0}}


def assert_facts(error: BaseException | None, kind: type[LoadError], path: Path, fqn: str, within: Span | None) -> None:
    """The error is of exactly that class and names the file, the FQN and a byte range within a span."""
    assert type(error) is kind, f"{error!r}"
    assert isinstance(error, LoadError)
    assert (error.path, error.fqn) == (str(path), fqn)
    assert error.offset is not None
    assert error.length is not None
    if within is not None:
        assert within.offset <= error.offset <= error.offset + error.length <= within.end
    text = str(error)
    for fact in (str(path), repr(fqn), f"bytes {error.offset} to {error.offset + error.length}"):
        assert fact in text
    if error.error_number:
        assert errno.errorcode[error.error_number] in text
    assert error.reason in text
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def check(
    checkpoint: Path,
    kind: type[LoadError],
    fqn: str,
    *,
    path: Path | str | None = None,
    within: Span | None = None,
    torch_loads: bool = False,
    accident: type[Exception] | tuple[()] = (),
    state: dict[str, Any] | None = None,
) -> None:
    """Load with dcp_fast and with torch: ours must be of that class, which torch's must be a base of."""
    theirs = torch_error(checkpoint, wanted() if state is None else state)
    for options in ({}, {"io": "direct"}, {"threads": 1}):
        with limited(20):
            ours = fast_error(checkpoint, wanted() if state is None else state, **options)
        assert_facts(ours, kind, path or span(checkpoint, fqn).path, fqn, within)
        if torch_loads:
            assert theirs is None, f"torch raises {theirs!r}: not stricter"
        elif not isinstance(theirs, ACCIDENTS) and not isinstance(theirs, accident):
            assert theirs is not None, "torch loads this"
            assert isinstance(ours, type(theirs)), f"{kind.__mro__} instead of {theirs!r}"


# Checkpoints and their damage


@dataclass(frozen=True)
class Span:
    """Where an entry is stored."""

    path: Path
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    def read(self) -> bytes:
        return self.path.read_bytes()[self.offset : self.end]


def span(path: Path, fqn: str, number: int = 0) -> Span:
    """Where a checkpoint has an entry, or one chunk of it."""
    with (path / ".metadata").open("rb") as file:
        storage = pickle.load(file).storage_data
    infos = [info for index, info in storage.items() if index.fqn == fqn]
    return Span(path / infos[number].relative_path, infos[number].offset, infos[number].length)


def by_offset(checkpoint: Path) -> list[tuple[str, Span]]:
    spans = [(fqn, span(checkpoint, fqn)) for fqn in ("small", "half", "large", "value.step")]
    return sorted(spans, key=lambda pair: pair[1].offset)


@contextlib.contextmanager
def edit_metadata(path: Path) -> Iterator[Metadata]:
    """The metadata of a checkpoint, written back at the end."""
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    yield metadata
    with (path / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def set_storage(path: Path, fqn: str, **values: Any) -> None:
    """Change fields of the storage info of all chunks of an entry."""
    with edit_metadata(path) as metadata:
        for index, info in metadata.storage_data.items():
            assert isinstance(index, MetadataIndex)
            if index.fqn == fqn:
                vars(info).update(values)


def resize_entry(path: Path, fqn: str, size: Sequence[int]) -> None:
    """Make the metadata say that a tensor of one chunk has another size."""
    with edit_metadata(path) as metadata:
        entry = metadata.state_dict_metadata[fqn]
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = torch.Size(size)
        entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(size)), entry.size)]
        (index,) = (index for index in metadata.storage_data if index.fqn == fqn)
        metadata.storage_data[MetadataIndex(fqn, entry.chunks[0].offsets, 0)] = metadata.storage_data.pop(index)


def replace_record(path: Path, fqn: str, record: bytes) -> None:
    """Store something else for an entry: at the end of its file, whatever was there stays."""
    file = span(path, fqn).path
    with file.open("ab") as stream:
        offset = stream.tell()
        stream.write(record)
    set_storage(path, fqn, offset=offset, length=len(record))


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file; they must change."""
    with path.open("r+b") as file:
        file.seek(offset)
        assert file.read(len(data)) != data
        file.seek(offset)
        file.write(data)


def record_parts(record: bytes) -> dict[str, int]:
    """Positions in a record that torch.save wrote.

    The local header of each entry ("data.pkl header"), its data ("data.pkl") and how much that is ("data.pkl size"),
    the "directory", the "end64" records and the "end" record.
    """
    with zipfile.ZipFile(io.BytesIO(record)) as file:
        parts = {"directory": file.start_dir, "end64": len(record) - 98, "end": len(record) - 22}
        for entry in file.infolist():
            name = entry.filename.split("/", 1)[1]
            parts[f"{name} header"] = entry.header_offset
            sizes = struct.unpack_from("<HH", record, entry.header_offset + 26)
            parts[name] = entry.header_offset + 30 + sum(sizes)
            parts[f"{name} size"] = entry.file_size
    return parts


def archive(pickled: bytes, storage: bytes = b"", **entries: bytes) -> bytes:
    """A record as torch.save writes it, around any pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as file:
        named = {"data.pkl": pickled, "byteorder": b"little", "data/0": storage, "version": b"3\n"}
        for name, data in {**named, **entries}.items():
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return stream.getvalue()


class Call:
    """Pickles into a call of a function, and then perhaps into a state that is set."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def legacy_record(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


# Limits


class HangError(BaseException):
    """A load took too long."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise HangError if the block takes too long; if not even that gets through, end the process with a traceback."""
    expired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise HangError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    if expired:  # and something caught it
        raise HangError(f"was still running after {seconds} s")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def threads_vanish(before: set[str]) -> bool:
    """Whether all threads but those are gone. The system lists a thread for a moment after it was joined."""
    deadline = time.monotonic() + 5
    while not threads() <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field + ":"))


def peak_memory() -> int:
    """Bytes that were resident at the most since ``reset_peak_memory``."""
    return _status("VmHWM")


def reset_peak_memory() -> int:
    """Forget the peak; the bytes that are resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def limit_address_space(extra: int) -> None:
    """Let this process map at most so many bytes more than it has."""
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + extra, resource.RLIM_INFINITY))


# Processes


class Child:
    """A function in a process of its own, which may be signalled and may die.

    The function gets a ``report`` callable as its first argument; :meth:`next` returns what it is called with, and at
    last what the function returns.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._connection, theirs = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=_call, args=(theirs, function, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def next(self, timeout: float) -> Any:
        """The next report. Raises EOFError if the process died, TimeoutError, or what the function raised."""
        if not self._connection.poll(timeout):
            self.close()
            raise TimeoutError(f"no report after {timeout} s")
        error, value = self._connection.recv()
        if error is not None:
            raise AssertionError(error)
        return value

    def close(self) -> int | None:
        """End the process if it has not ended; its exit code."""
        self._connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_child(function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> Any:
    """What ``function(report, *arguments)`` returns in a process of its own."""
    with Child(function, *arguments) as child:
        return child.next(timeout)


def _call(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = (None, function(lambda value: connection.send((None, value)), *arguments))
    except BaseException:
        result = (traceback.format_exc(), None)
    # Whoever asked may have had enough and closed its end.
    with contextlib.suppress(BrokenPipeError):
        connection.send(result)
    connection.close()
