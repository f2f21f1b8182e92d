"""Safetensors files that cannot be read, or that change before they are: errors that name file, tensor and range."""

from __future__ import annotations

import errno
import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Child, assert_facts, limited, open_files, threads, threads_vanish
from helpers import fill, load_with
from safetensors import SafetensorError
from safetensors.torch import save_file
from safetensors_files import header_of, hf_reader, save_hf, torch_hf_reader, write_file

import dcp_fast
from dcp_fast import _native
from dcp_fast.errors import LoadError

STATE = {"a": fill((300, 100), torch.float32, 1), "b": fill((64,), torch.int16, 2)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "model", dict(STATE), fqn_to_index_mapping={"a": 1, "b": 2})


def file_of(checkpoint: Path, fqn: str) -> Path:
    (file,) = (path for path in checkpoint.glob("*.safetensors") if fqn.encode() in path.read_bytes()[:300].split(b'"'))
    return file


def wanted() -> dict[str, Any]:
    return {fqn: torch.zeros_like(value) for fqn, value in STATE.items()}


def load_after(checkpoint: Path, change: Any, **options: Any) -> BaseException | None:
    """What a load raises whose files change after their headers were read."""

    class Changing(dcp_fast.HuggingFaceStorageReader):
        def read_metadata(self) -> Any:
            metadata = super().read_metadata()
            change()
            return metadata

    with limited(20):
        outcome = load_with(dcp_fast.load, wanted(), storage_reader=Changing(checkpoint, **options))
    return None if outcome.errors is None else outcome.errors[0]


def payload_of(path: Path, value: torch.Tensor) -> tuple[int, int]:
    return path.stat().st_size - value.nbytes, value.nbytes


def test_file_is_gone(checkpoint: Path) -> None:
    path = file_of(checkpoint, "a")
    place = payload_of(path, STATE["a"])
    error = load_after(checkpoint, path.unlink)
    assert_facts(error, dcp_fast.FileMissingError, path, "a", None)
    assert isinstance(error, LoadError)
    assert (error.offset, error.length, error.error_number) == (*place, errno.ENOENT)


def test_file_is_cut(checkpoint: Path) -> None:
    path = file_of(checkpoint, "a")
    offset, length = payload_of(path, STATE["a"])
    error = load_after(checkpoint, lambda: os.truncate(path, offset + length - 1))
    assert_facts(error, dcp_fast.TruncatedFileError, path, "a", None)
    assert isinstance(error, SafetensorError)  # as torch raises
    assert isinstance(error, LoadError)
    assert (error.offset, error.length) == (offset, length)


def test_file_becomes_a_pipe(checkpoint: Path) -> None:
    path = file_of(checkpoint, "a")

    def replace() -> None:
        path.unlink()
        os.mkfifo(path)

    assert_facts(load_after(checkpoint, replace), dcp_fast.FileAccessError, path, "a", None)


def test_file_is_cut_before_its_header_is_read(checkpoint: Path) -> None:
    path = file_of(checkpoint, "a")
    size = path.stat().st_size
    for length in (size - 1, size - STATE["a"].nbytes, 100, 8, 3, 0):
        os.truncate(path, length)
        outcome = load_with(dcp_fast.load, wanted(), checkpoint_id=checkpoint)
        assert outcome.errors is not None
        error = outcome.errors[0]
        assert type(error) is dcp_fast.CorruptHeaderError
        assert error.path == str(path)
        assert isinstance(error, EOFError)
        with pytest.raises(SafetensorError):
            torch_hf_reader(str(checkpoint)).read_metadata()


def test_directory_in_place_of_a_file(checkpoint: Path) -> None:
    (checkpoint / "more.safetensors").mkdir()
    with pytest.raises(dcp_fast.NotAFileError) as caught:
        hf_reader(checkpoint).read_metadata()
    assert caught.value.path == str(checkpoint / "more.safetensors")
    with pytest.raises((OSError, SafetensorError)):
        torch_hf_reader(str(checkpoint)).read_metadata()


def test_pipe_in_place_of_a_file(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "more.safetensors")
    with limited(20), pytest.raises(dcp_fast.FileAccessError):
        hf_reader(checkpoint).read_metadata()


def test_no_directory(tmp_path: Path) -> None:
    outcome = load_with(dcp_fast.load, wanted(), storage_reader=hf_reader(tmp_path / "nowhere"))
    assert outcome.errors is not None
    assert type(outcome.errors[0]) is dcp_fast.MetadataAccessError
    assert outcome.errors[0].error_number == errno.ENOENT


@pytest.mark.parametrize("function", ["open", "fstat", "pread"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EIO, dcp_fast.FileAccessError),
        (errno.EACCES, dcp_fast.FilePermissionError),
        (errno.ENOENT, dcp_fast.FileMissingError),
        (errno.ENOMEM, dcp_fast.OutOfMemoryError),
    ],
    ids=lambda value: errno.errorcode.get(value) if isinstance(value, int) else "",
)
def test_header_that_cannot_be_read(checkpoint: Path, function: str, number: int, expected: type[LoadError]) -> None:
    gc.collect()  # else what tests before this one left closes its files meanwhile
    before, running = open_files(), threads()
    for nth in range(2):
        with (
            _native.FaultInjection(function, nth=nth, error_number=number),
            pytest.raises(LoadError) as caught,
        ):
            hf_reader(checkpoint).read_metadata()
        assert type(caught.value) is expected
        assert caught.value.error_number == number
        assert Path(caught.value.path).parent == checkpoint
    assert open_files() == before
    assert threads_vanish(running)


@pytest.mark.parametrize("function", ["open", "pread"])
def test_payload_that_cannot_be_read(checkpoint: Path, function: str) -> None:
    path = file_of(checkpoint, "a")
    state = {"a": torch.zeros_like(STATE["a"])}
    with _native.FaultInjection(function, nth=-1) as counter:
        hf_reader(checkpoint).read_metadata()
    reader = hf_reader(checkpoint, io="cached", threads=1)
    with _native.FaultInjection(function, nth=counter.calls, error_number=errno.EIO):
        outcome = load_with(dcp_fast.load, state, storage_reader=reader)
    assert outcome.errors is not None
    assert_facts(outcome.errors[0], dcp_fast.FileAccessError, path, "a", None)
    assert outcome.errors[0].errno == errno.EIO


def test_every_call_fails_once(checkpoint: Path) -> None:
    """The load ends with the right data or a typed error, whichever call it is."""
    for function in ("open", "fstat", "pread", "close"):
        with _native.FaultInjection(function, nth=-1) as counter:
            load_with(dcp_fast.load, wanted(), storage_reader=hf_reader(checkpoint, io="cached"))
        assert counter.calls > 0
        for nth in range(counter.calls):
            state = wanted()
            with limited(20), _native.FaultInjection(function, nth=nth, error_number=errno.EIO):
                outcome = load_with(dcp_fast.load, state, storage_reader=hf_reader(checkpoint, io="cached"))
            if outcome.errors is None:
                assert all(torch.equal(state[fqn].view(torch.int16), STATE[fqn].view(torch.int16)) for fqn in STATE)
            else:
                assert isinstance(outcome.errors[0], dcp_fast.FileAccessError), (function, nth, outcome.errors)


def test_short_reads_are_continued(checkpoint: Path) -> None:
    state = wanted()
    with _native.FaultInjection("pread", nth=0, repeat=1 << 30, short_bytes=700):
        dcp_fast.load(state, storage_reader=hf_reader(checkpoint, io="cached"))
    assert torch.equal(state["b"], STATE["b"])
    assert torch.equal(state["a"].view(torch.int32), STATE["a"].view(torch.int32))


def test_box_that_exceeds_what_is_stored_now(tmp_path: Path) -> None:
    """The plan is of other files than those that are there when it is run: torch raises too."""
    save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    planner = dcp_fast.DefaultLoadPlanner()
    reader = hf_reader(tmp_path)
    metadata = reader.read_metadata()
    planner.set_up_planner({"a": torch.zeros(8)}, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = planner.create_local_plan()
    plan.items  # noqa: B018 - from here on the files are asked
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(dcp_fast.SizeMismatchError) as caught:
        reader.read_data(plan, planner)
    assert (caught.value.fqn, caught.value.path) == ("a", str(tmp_path / "model.safetensors"))
    theirs = torch_hf_reader(str(tmp_path))
    theirs.storage_data = dict(metadata.storage_data)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
        theirs.read_data(plan, planner)
    assert isinstance(caught.value, raised.type)


# Ctrl-C

HEADERS = 300
TENSORS = 1000  # in each file


def _slow_headers(report: Callable[[Any], None], path: Path, short: int) -> dict[str, Any]:
    """Read headers at some megabytes a second: every read is short."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files, before = open_files(), threads()
    facts: dict[str, Any] = {"error": "None"}
    with _native.FaultInjection("pread", nth=0, short_bytes=short, repeat=1 << 60) as faults:
        report("reading")
        try:
            hf_reader(path, threads=2).read_metadata()
        except KeyboardInterrupt:
            facts["error"] = "KeyboardInterrupt"
        facts["bytes read"] = faults.calls * short
    facts["files"] = open_files() - files
    facts["threads"] = threads_vanish(before)
    facts["again"] = len(hf_reader(path).read_metadata().state_dict_metadata)
    return facts


def test_ctrl_c_while_headers_are_read(tmp_path: Path) -> None:
    for number in range(HEADERS):
        header = header_of({f"model.layers.{number}.weight.{i}": ("U8", (0,), 0) for i in range(TENSORS)})
        write_file(tmp_path / f"model-{number:05}.safetensors", header, 0)
    with Child(_slow_headers, tmp_path, 1) as child:
        assert child.next(60) == "reading"
        time.sleep(0.5)
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGINT)
        facts = child.next(300)
        assert facts["error"] == "KeyboardInterrupt", "reading was not slow enough, or swallowed it"
        assert facts["files"] == 0
        assert facts["threads"]
        assert facts["again"] == HEADERS * TENSORS
        # Not by the clock: a busy machine takes its time for anything.
        assert 0 < facts["bytes read"] < 0.6 * sum(file.stat().st_size for file in tmp_path.iterdir())
        assert child.close() == 0
