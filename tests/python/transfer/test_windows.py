"""Planners with hooks get windows of items, and cannot tell them from torch's one by one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Entry, assert_same_load, fast_reader, fill, image, torch_load, torch_reader, write_checkpoint
from noticing_planners import COUNT, NOTICING, Swallowing, sizes
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

import dcp_fast
from dcp_fast import _native

Log = list[tuple[str, str]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors in two chunks, which lie in two files, with values between them."""
    entries: dict[str, Any] = {}
    for i in range(COUNT):
        whole = fill(sizes(i), torch.float32, i)
        chunks = [((0, 0), whole[:3].clone()), ((3, 0), whole[3:].clone())]
        entries[f"t{i:03}"] = Entry(sizes(i), torch.float32, chunks, file="__%d_0.distcp")
        if i % 20 == 10:
            entries[f"t{i:03}.value"] = Entry(value=i, file=f"__{i % 2}_0.distcp")
    return write_checkpoint(tmp_path_factory.mktemp("windows"), entries)


def state() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for i in range(COUNT):
        result[f"t{i:03}"] = torch.zeros(sizes(i))
        if i % 20 == 10:
            result[f"t{i:03}.value"] = None
    return result


def assert_loaded(loaded: dict[str, Any]) -> None:
    for i in range(COUNT):
        assert image(loaded[f"t{i:03}"]) == image(fill(sizes(i), torch.float32, i))


def logging_planner(log: Log, base: type = dcp.DefaultLoadPlanner, commits: bool = True) -> LoadPlanner:
    """Notes its calls where nobody can see it."""

    class Logging(base):  # type: ignore[misc]
        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            log.append(("resolve", item.dest_index.fqn))
            result: torch.Tensor = super().resolve_tensor(item)
            return result

        def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
            log.append(("bytes", item.dest_index.fqn))
            super().load_bytes(item, value)

    class Committing(Logging):
        def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
            log.append(("commit", f"{item.dest_index.fqn} {image(tensor)}"))
            super().commit_tensor(item, tensor)

    planner: LoadPlanner = Committing() if commits else Logging()
    return planner


def run_lengths(log: Log, what: str) -> list[int]:
    """How many calls of a kind there are in a row, each time."""
    lengths, before = [], ""
    for kind, _ in log:
        if kind == what:
            lengths[-1:] = [lengths[-1] + 1] if before == what else [*lengths[-1:], 1]
        before = kind
    return lengths


def test_items_are_resolved_ahead(stored: Path) -> None:
    """Or these tests would prove nothing. Each kind of call comes in torch's order."""
    ours: Log = []
    theirs: Log = []
    states = [state(), state()]
    dcp_fast.load(states[0], storage_reader=fast_reader(stored), planner=logging_planner(ours))
    torch_load(states[1], storage_reader=torch_reader(stored), planner=logging_planner(theirs))
    assert image(states[0]) == image(states[1])
    assert max(run_lengths(theirs, "resolve")) == 1
    assert max(run_lengths(ours, "resolve")) >= COUNT // 4
    for kinds in ({"resolve"}, {"commit", "bytes"}):
        assert [call for call in ours if call[0] in kinds] == [call for call in theirs if call[0] in kinds]


def test_without_commits_boxes_of_one_tensor_share_a_window(stored: Path) -> None:
    log: Log = []
    loaded = state()
    dcp_fast.load(loaded, storage_reader=fast_reader(stored), planner=logging_planner(log, commits=False))
    assert max(run_lengths([call for call in log if call[0] != "bytes"], "resolve")) == 2 * COUNT
    assert_loaded(loaded)


@pytest.mark.parametrize("repeat", [1, 2, 3, 1 << 30])
def test_a_planner_that_swallows_what_placing_raises(stored: Path, repeat: int) -> None:
    expected = state()
    with _native.FaultInjection("pread", nth=-1) as counter:
        dcp_fast.load(expected, checkpoint_id=stored, planner=Swallowing(), no_dist=True)
    assert counter.calls > 20
    errors: list[Any] = []
    for nth in range(counter.calls):
        loaded = state()
        try:
            with _native.FaultInjection("pread", nth, error_number=5, repeat=repeat):
                dcp_fast.load(loaded, checkpoint_id=stored, planner=Swallowing(), no_dist=True)
        except CheckpointException as error:
            errors.append(error.failures[0][0])
        else:
            assert image(loaded) == image(expected), nth
    assert len(errors) > 2
    assert all(isinstance(error, dcp_fast.LoadError) for error in errors)


@pytest.mark.parametrize("planner", NOTICING)
@pytest.mark.parametrize("options", [{}, {"staging_bytes": 200}])
def test_planners_that_would_notice(stored: Path, planner: Callable[[], LoadPlanner], options: dict[str, Any]) -> None:
    outcome = assert_same_load(stored, state, planner=planner, options=options, fallback=None)
    assert any(bool(tensor.any()) for tensor in outcome.state.values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("at", [0, 1, 9, 70, 2 * COUNT - 1])
def test_a_resolve_that_raises(stored: Path, at: int) -> None:
    """All before it is in place and committed, as under torch."""
    logs: list[Log] = []

    def planner() -> LoadPlanner:
        logs.append([])
        planner = logging_planner(logs[-1])
        resolve, calls = planner.resolve_tensor, [0]

        def failing(item: ReadItem) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == at + 1:
                raise KeyError("of the planner")
            return resolve(item)

        planner.resolve_tensor = failing  # type: ignore[method-assign]
        return planner

    states = [state(), state()]
    for load, into, reader in ((dcp_fast.load, states[0], fast_reader), (torch_load, states[1], torch_reader)):
        with pytest.raises(dcp.api.CheckpointException):
            load(into, storage_reader=reader(stored), planner=planner())
    assert image(states[0]) == image(states[1])
    ours, theirs = ([call for call in log if call[0] != "resolve"] for log in logs)
    assert ours == theirs


def test_a_record_that_is_damaged(stored: Path, tmp_path: Path) -> None:
    """All before it in the plan is committed, though a window had more."""
    entries = {f"t{i:03}": Entry.of(fill(sizes(i), torch.float32, i)) for i in range(COUNT)}
    path = write_checkpoint(tmp_path, entries)
    info = fast_reader(path).read_metadata().storage_data[MetadataIndex("t040", torch.Size((0, 0)), 0)]
    file = path / info.relative_path
    data = bytearray(file.read_bytes())
    data[info.offset : info.offset + 60] = bytes(60)
    file.write_bytes(data)
    log: Log = []
    wanted = {name: torch.zeros(sizes(int(name[1:]))) for name in entries}
    with pytest.raises(dcp.api.CheckpointException) as error:
        dcp_fast.load(wanted, storage_reader=fast_reader(path), planner=logging_planner(log))
    (failure,) = error.value.failures.values()
    assert isinstance(failure[0], dcp_fast.LoadError)
    assert "t040" in str(failure[0])
    committed = [name.split()[0] for kind, name in log if kind == "commit"]
    assert committed in ([], [f"t{i:03}" for i in range(40)])


def test_failing_reads(stored: Path) -> None:
    """A read that fails once makes a window fail, and is repeated one by one; one that fails for good is an error."""
    with _native.FaultInjection("pread", nth=-1) as counter:
        dcp_fast.load(state(), storage_reader=fast_reader(stored, io="cached"), planner=logging_planner([]))
    for nth in range(counter.calls // 2, counter.calls, max(1, counter.calls // 20)):
        logs: Log = []
        with _native.FaultInjection("pread", nth=nth, error_number=5):
            try:
                loaded = state()
                reader = fast_reader(stored, io="cached")
                dcp_fast.load(loaded, storage_reader=reader, planner=logging_planner(logs))
            except dcp.api.CheckpointException as error:
                (failure,) = error.failures.values()
                assert isinstance(failure[0], dcp_fast.FileAccessError)
                continue
        assert_loaded(loaded)
