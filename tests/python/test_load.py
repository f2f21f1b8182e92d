"""The entry points: the same arguments, warnings and errors as torch's."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import fill, image, save

import dcp_fast
from dcp_fast._torch import fsspec_filesystem

STORED = {"t": fill((3, 2), torch.float32), "n": 4}


def zeros() -> dict[str, Any]:
    return {"t": torch.zeros(3, 2), "n": 0}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", dict(STORED))


def caught(call: Any, *args: Any, **kwargs: Any) -> list[tuple[type[Warning], str, str]]:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return [(record.category, str(record.message), record.filename) for record in records]


OWN_ARGUMENTS = {
    "load": ["trace", "share_metadata", "share_reads", "exchange_bytes", "trust_metadata", "trust_bytes"],
    "DefaultLoadPlanner": ["trust_bytes"],
}


@pytest.mark.parametrize("name", ["load", "load_state_dict", "create_read_items_for_chunk_list", "DefaultLoadPlanner"])
def test_signatures(name: str) -> None:
    theirs = getattr(dcp, name, None) or getattr(dcp.planner_helpers, name)
    expected = inspect.signature(theirs).parameters
    actual = inspect.signature(getattr(dcp_fast, name)).parameters
    ours = OWN_ARGUMENTS.get(name, [])
    assert list(actual) == [*expected, *ours]
    assert all(actual[parameter].kind == inspect.Parameter.KEYWORD_ONLY for parameter in ours)
    for parameter in expected:
        assert actual[parameter].kind == expected[parameter].kind
        assert actual[parameter].default == expected[parameter].default


def test_reader_takes_torchs_arguments_first() -> None:
    expected = list(inspect.signature(dcp.FileSystemReader).parameters)
    actual = inspect.signature(dcp_fast.FileSystemReader).parameters
    assert list(actual)[: len(expected)] == expected
    assert all(p.kind == p.KEYWORD_ONLY for p in list(actual.values())[len(expected) :])


@pytest.mark.parametrize("kind", ["Path", "str", "PathLike", "relative"])
def test_checkpoint_id(stored: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fspath(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(stored)

    monkeypatch.chdir(stored.parent)
    checkpoint_id = {"Path": stored, "str": str(stored), "PathLike": Fspath(), "relative": "ckpt"}[kind]

    def load(function: Any) -> Any:
        state = zeros()
        try:
            function(state, checkpoint_id=checkpoint_id)
        except BaseException as error:
            return type(error)
        return image(state)

    before = dcp_fast.last_report()
    expected = load(dcp.load)
    assert load(dcp_fast.load) == expected
    if expected == image(STORED):
        assert dcp_fast.last_report() is not before
    else:
        assert kind == "PathLike", "torch itself fails"


@pytest.mark.parametrize("checkpoint_id", [None, "", "unknown://x"])
def test_checkpoint_id_that_torch_refuses(checkpoint_id: Any) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        dcp.load(zeros(), checkpoint_id=checkpoint_id)
    with pytest.raises(type(theirs.value)) as ours:
        dcp_fast.load(zeros(), checkpoint_id=checkpoint_id)
    assert str(ours.value) == str(theirs.value)


def test_missing_directory(tmp_path: Path) -> None:
    raised = []
    for load in (dcp.load, dcp_fast.load):
        with pytest.raises(dcp.CheckpointException if hasattr(dcp, "CheckpointException") else BaseException) as info:
            load(zeros(), checkpoint_id=tmp_path / "missing")
        raised.append(info.value.failures[0][0])  # type: ignore[attr-defined]
    assert isinstance(raised[1], type(raised[0]))
    assert type(raised[1]) is dcp_fast.MetadataAccessError
    theirs, ours = map(str, raised)
    assert theirs.startswith("metadata is None")
    says_why = theirs != "metadata is None"  # torch 2.11 leaves it at that
    for text in (
        "metadata is None; global metadata read failed",
        "rank local metadata read failed",
        "missing/.metadata",
    ):
        assert text in ours
        assert text in theirs or not says_why


def test_checkpoint_id_turns_a_reader_elsewhere(stored: Path, tmp_path: Path) -> None:
    state = zeros()
    dcp_fast.load(state, checkpoint_id=stored, storage_reader=dcp_fast.FileSystemReader(tmp_path / "missing"))
    assert image(state) == image(STORED)
    state = zeros()
    dcp_fast.load(state, checkpoint_id=stored, storage_reader=dcp.FileSystemReader(tmp_path / "missing"))
    assert image(state) == image(STORED)


def test_two_positional_arguments(stored: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored)
    states = [zeros(), zeros()]
    expected = caught(dcp.load, states[0], reader)
    actual = caught(dcp_fast.load, states[1], reader)
    assert [warning[:2] for warning in actual] == [warning[:2] for warning in expected]
    assert any("argument order of load" in message for _, message, _ in actual)
    assert image(states[1]) == image(states[0]) == image(STORED)


def test_three_positional_arguments(stored: Path) -> None:
    for load in (dcp.load, dcp_fast.load):
        with pytest.raises(TypeError):
            load(zeros(), dcp_fast.FileSystemReader(stored), None)  # type: ignore[misc]


def test_warning_without_a_process_group(stored: Path) -> None:
    expected = caught(dcp.load, zeros(), checkpoint_id=stored)
    actual = caught(dcp_fast.load, zeros(), checkpoint_id=stored)
    assert [warning[:2] for warning in actual] == [warning[:2] for warning in expected]
    assert any("torch.distributed is disabled" in message for _, message, _ in actual)
    assert len(actual) == 1


def test_load_state_dict_warns_once(stored: Path) -> None:
    expected = caught(dcp.load_state_dict, zeros(), dcp.FileSystemReader(stored), no_dist=True)
    state = zeros()
    actual = caught(dcp_fast.load_state_dict, state, dcp_fast.FileSystemReader(stored), no_dist=True)
    assert actual == expected
    assert [category for category, _, _ in actual] == [FutureWarning]
    assert image(state) == image(STORED)


def test_load_state_dict_with_all_arguments(stored: Path) -> None:
    for load in (dcp.load_state_dict, dcp_fast.load_state_dict):
        state = zeros()
        with pytest.warns(FutureWarning):
            load(state, dcp_fast.FileSystemReader(stored), None, 0, True, dcp.DefaultLoadPlanner())
        assert image(state) == image(STORED)


@pytest.mark.parametrize("installed", [False, True])
def test_remote_checkpoints_go_to_the_reader_of_torch(installed: bool) -> None:
    pytest.importorskip("fsspec")
    dcp.save(dict(STORED), storage_writer=fsspec_filesystem.FsspecWriter(f"memory://dcp_fast_test_{installed}"))
    state = zeros()
    if installed:
        with dcp_fast.install():
            dcp.load(state, checkpoint_id=f"memory://dcp_fast_test_{installed}")
    else:
        dcp_fast.load(state, checkpoint_id=f"memory://dcp_fast_test_{installed}")
    assert image(state) == image(STORED)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.path == f"memory://dcp_fast_test_{installed}"
    assert report.reader.endswith("FsspecReader")
    assert "MemoryFileSystem" in report.reader_fallback_reason
    assert not report.is_fast
    assert report.bytes_read == 0


def test_default_planner_and_reader_are_ours(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = dcp_fast.FileSystemReader.read_data
    monkeypatch.setattr(
        dcp_fast.FileSystemReader,
        "read_data",
        lambda self, plan, planner: seen.append(planner) or original(self, plan, planner),
    )
    dcp_fast.load(zeros(), checkpoint_id=stored)
    planner = dcp.DefaultLoadPlanner()
    dcp_fast.load(zeros(), checkpoint_id=stored, planner=planner)
    assert type(seen[0]) is dcp_fast.DefaultLoadPlanner
    assert seen[1] is planner


def test_nothing_is_returned(stored: Path) -> None:
    assert dcp_fast.load(zeros(), checkpoint_id=stored) is None  # type: ignore[func-returns-value]


def test_public_names_exist() -> None:
    for name in dcp_fast.__all__:
        assert getattr(dcp_fast, name) is not None
