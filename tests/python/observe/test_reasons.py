"""What a report says of reader and planner, of the whole time of a load, and which load is the last."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign_readers import STORED, Foreign, report_of, zeros
from helpers import image, load_with, save, torch_load, torch_reader
from ranks import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dcp_fast
from dcp_fast.observe import report as report_module


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", STORED)


class Hooked(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> Any:
        return super().resolve_tensor(read_item)


class Remembering(dcp.DefaultLoadPlanner):
    """Keeps something at each item."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def resolve_tensor(self, read_item: Any) -> Any:
        self.last = read_item.dest_index.fqn
        return super().resolve_tensor(read_item)


class Committing(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__()
        self.committed = 0

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.committed += 1


class Looking(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> Any:
        for value in self.state_dict.values():
            value.sum()
        return super().resolve_tensor(read_item)


class Hiding(Hooked):
    __slots__ = ("hidden",)


class Planning(dcp.DefaultLoadPlanner):
    def create_local_plan(self) -> dcp.LoadPlan:
        return super().create_local_plan()


def test_fast_load(stored: Path) -> None:
    report = report_of(dcp_fast.load, zeros(), checkpoint_id=stored)
    assert report.reader == "dcp_fast.readers.filesystem.FileSystemReader"
    assert report.planner == "dcp_fast.planning.planner.DefaultLoadPlanner"
    assert report.is_fast
    assert report.reader_fallback_reason == report.planner_fallback_reason == ""
    assert f"load of {stored} by {report.reader} and {report.planner}" in str(report)


@pytest.mark.parametrize("driver", [dcp_fast.load, torch_load])
def test_planners(stored: Path, driver: Any) -> None:
    for planner, words in (
        (dcp_fast.DefaultLoadPlanner(), []),
        # Our own load makes a plan that a planner only inherits from torch's.
        (Hooked(), ["plans without"] if driver is torch_load else []),
        (Planning(), ["plans without"]),
    ):
        reader = dcp_fast.FileSystemReader(stored)
        report = report_of(driver, zeros(), storage_reader=reader, planner=planner)
        assert report.planner.endswith(type(planner).__name__)
        assert report.reader_fallback_reason == ""
        assert report.is_fast == (not words)
        assert all(word in report.planner_fallback_reason for word in words)


def test_planners_while_installed(stored: Path) -> None:
    with dcp_fast.install():
        assert report_of(dcp.load, zeros(), checkpoint_id=stored, planner=Planning()).is_fast
        assert report_of(dcp.load, zeros(), checkpoint_id=stored, planner=Hooked()).is_fast


@pytest.mark.parametrize(
    ("planner", "words"),
    [
        (Remembering, "its hooks change what it keeps"),
        (Committing, "its hooks change what it keeps"),
        (Looking, "its resolve_tensor looks at values"),
        (Hiding, "nobody can watch"),
    ],
)
def test_planners_that_need_items_one_by_one(tmp_path: Path, planner: Any, words: str) -> None:
    stored = {"t": torch.ones(3), **{f"w{number}": torch.full((2,), float(number)) for number in range(20)}}
    save(tmp_path, stored)
    state = {fqn: torch.zeros_like(value) for fqn, value in stored.items()}
    report = report_of(dcp_fast.load, state, checkpoint_id=tmp_path, planner=planner())
    assert image(state) == image(stored)
    assert not report.is_fast
    assert report.planner_fallback_reason.startswith("items are read one by one, as ")
    assert words in report.planner_fallback_reason


def test_planner_that_changes_once_is_fast(tmp_path: Path) -> None:
    class Beginning(Remembering):
        def resolve_tensor(self, read_item: Any) -> Any:
            self.last = self.last or read_item.dest_index.fqn
            return dcp.DefaultLoadPlanner.resolve_tensor(self, read_item)

    stored = {f"w{number}": torch.full((2,), float(number)) for number in range(20)}
    save(tmp_path, stored)
    state = {fqn: torch.zeros_like(value) for fqn, value in stored.items()}
    assert report_of(dcp_fast.load, state, checkpoint_id=tmp_path, planner=Beginning()).is_fast
    assert image(state) == image(stored)


class Swapping(dcp.DefaultLoadPlanner):
    """Has a place for what it resolves, and forgets it when that is committed; ``keeps``: one item later."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        self.keeps = keeps
        self.swapped: Any = None

    def resolve_tensor(self, read_item: Any) -> Any:
        tensor = super().resolve_tensor(read_item)
        if tensor.is_contiguous():
            return tensor
        self.swapped = tensor
        return torch.full(tensor.shape, -1.0)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        if self.swapped is not None:
            if tensor is not self.swapped and self.swapped.shape == tensor.shape:
                self.swapped.copy_(tensor)
            self.swapped = tensor if self.keeps and self.swapped is not tensor else None


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("installed", [False, True])
def test_planner_that_puts_back_what_it_changed_is_fast(tmp_path: Path, keeps: bool, installed: bool) -> None:
    stored = {f"w{number}": torch.full((2, 3), float(number)) for number in range(200)}
    save(tmp_path, stored)

    def make() -> dict[str, torch.Tensor]:
        strided = {f"w{number}" for number in (0, 7, 60, 61, 199)}
        return {fqn: torch.zeros(3, 2).t() if fqn in strided else torch.zeros(2, 3) for fqn in stored}

    state, expected = make(), make()
    torch_load(expected, checkpoint_id=tmp_path, planner=Swapping(keeps))
    with dcp_fast.install() if installed else nullcontext():
        load = dcp.load if installed else dcp_fast.load
        report = report_of(load, state, checkpoint_id=tmp_path, planner=Swapping(keeps))
    assert image(state) == image(expected)
    assert keeps or all(torch.equal(state[fqn], stored[fqn]) for fqn in stored)
    assert report.is_fast == (not keeps)


class OwnMetadata(dcp.FileSystemReader):
    def read_metadata(self, *arguments: Any, **keywords: Any) -> Any:
        with open(self.path / ".metadata", "rb") as file:
            return pickle.load(file)


class HandsOn(dcp.FileSystemReader):
    def read_metadata(self, *arguments: Any, **keywords: Any) -> Any:
        return super().read_metadata(*arguments, **keywords)


@pytest.mark.parametrize("installed", [False, True])
def test_metadata(stored: Path, installed: bool) -> None:
    with dcp_fast.install() if installed else nullcontext():
        for reader, is_fast in (
            (dcp.FileSystemReader, True),
            (dcp_fast.FileSystemReader, True),
            (HandsOn, installed),
            (OwnMetadata, False),
        ):
            report = report_of(dcp_fast.load, zeros(), storage_reader=reader(stored))
            assert report.is_fast == (not report.metadata_fallback_reason) == is_fast
            assert report.reader_fallback_reason == report.planner_fallback_reason == ""
            assert ("not fast: metadata: the reader has a read_metadata of its own" in str(report)) == (not is_fast)


def test_metadata_that_only_python_reads(stored: Path) -> None:
    metadata: Any = torch_reader(stored).read_metadata()
    metadata.planner_data = {"more": {1, 2}}
    (stored / ".metadata").write_bytes(pickle.dumps(metadata))
    report = report_of(dcp_fast.load, zeros(), checkpoint_id=stored)
    assert report.metadata_fallback_reason == "it holds what the native reader does not know"


def test_path_of_readers_of_others(stored: Path) -> None:
    report = report_of(dcp_fast.load, zeros(), storage_reader=Foreign(stored))
    assert report.path == str(stored)
    report = report_of(dcp_fast.load, zeros(), storage_reader=WithoutPath(stored))
    assert "load of ? by " in str(report)


class WithoutPath(Foreign):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.folder, self.path = path, None

    def read_metadata(self) -> Any:
        self.path = self.folder
        try:
            return super().read_metadata()
        finally:
            self.path = None

    def read_data(self, plan: Any, planner: Any) -> Any:
        self.path = self.folder
        return super().read_data(plan, planner)


class ReadsItself(dcp_fast.FileSystemReader):
    def read_data(self, plan: Any, planner: Any) -> Any:
        return dcp.FileSystemReader.read_data(self, plan, planner)


def test_reader_derived_from_ours_that_reads_itself(stored: Path) -> None:
    report = report_of(dcp_fast.load, zeros(), storage_reader=ReadsItself(stored))
    assert report.reader.endswith("ReadsItself")
    assert "read_data" in report.reader_fallback_reason


class Wrapping(Foreign):
    """Leaves the reading to a reader that it holds."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.inner = dcp_fast.FileSystemReader(path)

    def read_data(self, plan: Any, planner: Any) -> Any:
        self.inner.storage_data = self.storage_data
        return self.inner.read_data(plan, planner)


def test_reader_that_wraps_ours(stored: Path) -> None:
    reader = Wrapping(stored)
    reader.infos = lambda info: info
    report = report_of(dcp_fast.load, zeros(), storage_reader=reader)
    assert report.reader.endswith("Wrapping")
    assert report.reader_fallback_reason == report.planner_fallback_reason == ""
    assert report.records == 3
    assert report.bytes_read > 0


def test_each_cause_is_logged_once(
    stored: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "_logged_reasons", set())
    with caplog.at_level(logging.INFO, "dcp_fast"):
        for _ in range(3):
            dcp_fast.load(zeros(), storage_reader=ReadsItself(stored))
            dcp_fast.load(zeros(), checkpoint_id=stored, planner=Planning())
            dcp_fast.load(zeros(), checkpoint_id=stored)
    causes = [message for message in caplog.messages if "not fast. " in message]
    assert len(causes) == 2
    assert all("\n" not in cause and str(stored) in cause for cause in causes)
    assert "ReadsItself" in causes[0]
    assert "read_data" in causes[0]
    assert "Planning" in causes[1]
    assert "plans without" in causes[1]


def test_failed_load_names_who_failed(stored: Path) -> None:
    before = dcp_fast.last_report()
    assert load_with(dcp_fast.load, {"missing": torch.zeros(3)}, checkpoint_id=stored).errors
    report = dcp_fast.last_report()
    assert report is not before
    assert report is not None
    assert report.path == str(stored)
    assert report.is_fast
    assert report.seconds["metadata"] > 0


# Which load is the last


@pytest.mark.parametrize("installed", [False, True])
def test_metadata_alone_is_no_load(stored: Path, installed: bool) -> None:
    report = report_of(dcp_fast.load, zeros(), checkpoint_id=stored)
    dcp_fast.FileSystemReader(stored).read_metadata()
    if installed:
        with dcp_fast.install():
            dcp.FileSystemReader(stored).read_metadata()
    assert dcp_fast.last_report() is report
    with pytest.raises(OSError, match="missing"):
        dcp_fast.FileSystemReader(stored / "missing").read_metadata()
    assert dcp_fast.last_report() is report


def test_arguments_that_are_wrong_begin_no_load(stored: Path) -> None:
    report = report_of(dcp_fast.load, zeros(), checkpoint_id=stored)
    with pytest.raises(ValueError, match="needs a dcp_fast"):
        dcp_fast.load(zeros(), storage_reader=Foreign(stored), trust_metadata=True)
    with pytest.raises(RuntimeError):
        dcp_fast.load(zeros())
    assert dcp_fast.last_report() is report


class LoadsAnother:
    """A value that loads a checkpoint of its own while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report: dcp_fast.LoadReport | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"t": torch.zeros(300, 5)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.report = report_of(dcp_fast.load, {"u": torch.zeros(7, dtype=torch.int8)}, checkpoint_id=self.path)


def test_load_within_a_load(stored: Path, tmp_path: Path) -> None:
    save(tmp_path / "outer", {"value": {"t": torch.ones(300, 5)}})
    value = LoadsAnother(stored)
    report = report_of(dcp_fast.load, {"value": value}, checkpoint_id=tmp_path / "outer")
    assert value.report is not None
    assert value.report is not report
    assert (value.report.path, report.path) == (str(stored), str(tmp_path / "outer"))
    assert (value.report.records, report.records) == (1, 1)
    assert report.seconds["commit"] > value.report.total_seconds


def test_reports_of_threads_are_apart(stored: Path, tmp_path: Path) -> None:
    save(tmp_path / "small", {"u": torch.ones(1)})
    began, go_on = threading.Event(), threading.Event()

    class Waiting(dcp_fast.DefaultLoadPlanner):
        def finish_plan(self, new_plan: dcp.LoadPlan) -> dcp.LoadPlan:
            began.set()
            go_on.wait(60)
            return new_plan

    thread = threading.Thread(
        target=dcp_fast.load, args=(zeros(),), kwargs={"checkpoint_id": stored, "planner": Waiting(), "no_dist": True}
    )
    thread.start()
    began.wait(60)
    waiting = dcp_fast.last_report()
    report = report_of(dcp_fast.load, {"u": torch.zeros(1)}, checkpoint_id=tmp_path / "small")
    assert report.records == 1
    go_on.set()
    thread.join()
    assert waiting is not None
    assert waiting.records == 3


def test_reader_of_a_failed_load_begins_anew(stored: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored)
    metadata = reader.read_metadata()
    failing = dcp_fast.DefaultLoadPlanner()
    with pytest.raises(RuntimeError):
        run_by_hand(reader, metadata, failing, {"missing": torch.zeros(1)})
    failed = dcp_fast.last_report()
    time.sleep(0.05)
    run_by_hand(reader, metadata, dcp_fast.DefaultLoadPlanner(), zeros())
    report = dcp_fast.last_report()
    assert report is not None
    assert report is not failed
    assert report.records == 3
    assert report.total_seconds < 0.05


def run_by_hand(reader: Any, metadata: Any, planner: Any, state: Any) -> None:
    reader.set_up_storage_reader(metadata, True)
    planner.set_up_planner(state, metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(plan, planner).wait()


def test_report_can_be_sent_while_its_load_goes_on(stored: Path) -> None:
    sent = []

    class Sending(dcp_fast.DefaultLoadPlanner):
        def finish_plan(self, new_plan: dcp.LoadPlan) -> dcp.LoadPlan:
            sent.append(pickle.dumps(dcp_fast.last_report()))
            return new_plan

    dcp_fast.load(zeros(), checkpoint_id=stored, planner=Sending())
    received = pickle.loads(sent[0])
    assert received.path == str(stored)
    assert vars(received).keys() == vars(dcp_fast.LoadReport()).keys()


# The time of a load


def share_of_time(path: Path, make: Any, driver: Any = dcp_fast.load, **arguments: Any) -> float:
    """The largest share of the wall time that a report tells, of several loads: others may interrupt one."""
    shares = []
    for _ in range(5):
        state = make()
        if "storage_reader" not in arguments:
            arguments["storage_reader"] = dcp_fast.FileSystemReader(path)
        begin = time.perf_counter()
        report = report_of(driver, state, **arguments)
        shares.append(report.total_seconds / (time.perf_counter() - begin))
        assert shares[-1] <= 1
    return max(shares)


@pytest.mark.usefixtures("gloo")
def test_stages_of_a_load_of_dtensors_add_up(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(1000)]
    save(tmp_path, {name: torch.zeros(8, 8) for name in names})
    mesh = init_device_mesh("cpu", (1,))

    def make() -> dict[str, Any]:
        return {name: DTensor.from_local(torch.ones(8, 8), mesh, [Shard(0)]) for name in names}

    assert share_of_time(tmp_path, make) > 0.95
    with dcp_fast.install():
        assert share_of_time(tmp_path, make, dcp.load) > 0.95


def test_stages_of_all_kinds_of_loads_add_up(tmp_path: Path) -> None:
    names = [f"w{number}" for number in range(1000)]
    stored = {"nested": {name: torch.zeros(8, 8) for name in names}, **{f"n{number}": number for number in range(100)}}
    save(tmp_path, stored)
    assert share_of_time(tmp_path, lambda: dict(stored)) > 0.95
    assert share_of_time(tmp_path, lambda: dict(stored), planner=Hooked()) > 0.95
    assert share_of_time(tmp_path, lambda: dict(stored), storage_reader=dcp.FileSystemReader(tmp_path)) > 0.95
    assert share_of_time(tmp_path, lambda: dict(stored), torch_load) > 0.8, "torch flattens before and after"


def wait_for_the_other(path: Path) -> dcp_fast.LoadReport:
    class Late(dcp_fast.DefaultLoadPlanner):
        def set_up_planner(self, *arguments: Any, **keywords: Any) -> None:
            super().set_up_planner(*arguments, **keywords)
            time.sleep(1.5 * dist.get_rank())

    return report_of(dcp_fast.load, zeros(), checkpoint_id=path, planner=Late())


def test_waiting_for_other_ranks_is_a_stage(stored: Path, ranks: Ranks) -> None:
    early, late = ranks.run(2, wait_for_the_other, stored)
    assert early.seconds["ranks"] - late.seconds["ranks"] > 0.7  # of 1.5, as processes do not begin at once
    assert late.seconds["planning"] - early.seconds["planning"] > 0.7
