"""The timeline of a load, and how long it read and waited."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import Entry, ShardedBuffer, fill, load_with, save, write_checkpoint
from ranks import Ranks

import dcp_fast
from dcp_fast import _native
from dcp_fast.observe import trace as trace_module

FLOAT = torch.float32
STAGES = {"metadata", "planning", "ranks", "layout", "transfer", "commit"}

Event = dict[str, Any]


class Trace:
    """A trace file, checked as a viewer would."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        events: list[Event] = content["traceEvents"]
        self.spans = [event for event in events if event["ph"] == "X"]
        metadata = [event for event in events if event["ph"] == "M"]
        assert len(self.spans) + len(metadata) == len(events)
        self.processes = {e["pid"]: e["args"]["name"] for e in metadata if e["name"] == "process_name"}
        self.threads = {e["tid"]: e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
        by_track: dict[int, list[Event]] = defaultdict(list)
        for span in self.spans:
            assert span["pid"] in self.processes
            assert span["ts"] >= 0
            assert span["dur"] >= 0
            by_track[span["tid"]].append(span)
        assert set(by_track) <= set(self.threads)
        for spans in by_track.values():
            ends: list[float] = []  # of the spans that the next one may lie in
            for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
                end = span["ts"] + span["dur"]
                while ends and ends[-1] <= span["ts"] + 1e-3:
                    ends.pop()
                assert not ends or end <= ends[-1] + 1e-3, "spans of one thread nest or follow each other"
                ends.append(end)

    def named(self, name: str) -> list[Event]:
        return [span for span in self.spans if span["name"] == name]

    def bytes(self, name: str) -> int:
        return sum(span["args"]["bytes"] for span in self.named(name))

    def seconds(self, name: str) -> float:
        return sum(span["dur"] for span in self.named(name)) / 1e6

    def check(self, report: dcp_fast.LoadReport) -> None:
        """The trace is of the load that this report is of."""
        assert self.bytes("read") == report.bytes_read
        assert len(self.named("read")) == report.requests
        stages = [span for span in self.spans if self.threads[span["tid"]] == "load"]
        assert {span["name"] for span in stages} <= STAGES
        for stage, seconds in report.seconds.items():
            assert self.seconds(stage) == pytest.approx(seconds, abs=1e-6 * (1 + len(stages)))
        # The clock stops after the span has been recorded, which may take long on a busy machine.
        assert self.seconds("read") <= report.wait_seconds["disk"] + 1e-6 * (1 + report.requests)


def last_report() -> dcp_fast.LoadReport:
    report = dcp_fast.last_report()
    assert report is not None
    return report


def mixed_checkpoint(path: Path) -> dict[str, Any]:
    """Stores tensors that are read in place, sliced, converted and left to torch.load, and an object."""
    stored = {
        "plain": Entry.of(fill((3000, 400), FLOAT)),
        "strips": Entry.of(fill((2000, 100), FLOAT)),
        "half": Entry.of(torch.ones(500, 500, dtype=torch.half)),
        "old": Entry.of(fill((9,), FLOAT), legacy=True),
        "object": list(range(100_000)),
    }
    write_checkpoint(path, stored)
    return {
        "plain": torch.zeros(3000, 400),
        "strips": ShardedBuffer.make((2000, 100), [(0, 50)], [torch.zeros(2000, 8)]),
        "half": torch.zeros(500, 500),
        "old": torch.zeros(9),
        "object": None,
    }


@pytest.mark.parametrize("io", ["cached", "direct"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_kind_of_work_is_there(tmp_path: Path, io: str, threads: int) -> None:
    state = mixed_checkpoint(tmp_path / "checkpoint")
    reader = dcp_fast.FileSystemReader(tmp_path / "checkpoint", io=io, threads=threads)  # type: ignore[arg-type]
    dcp_fast.load(state, storage_reader=reader, trace=tmp_path / "load.json")
    trace, report = Trace(tmp_path / "load.json"), last_report()
    trace.check(report)
    assert {span["name"] for span in trace.spans} >= {*STAGES, "read", "slice", "convert", "torch.load"}
    assert trace.bytes("convert") == 500 * 500 * 2
    assert trace.bytes("slice") >= 2000 * 8 * 4
    assert trace.processes == {0: "dcp_fast"}
    readers = {name for name in trace.threads.values() if name != "load"}
    assert readers == {f"reader {number}" for number in range(1, len(readers) + 1)}
    assert "load" in trace.threads.values()
    assert {os.path.basename(span["args"]["path"]) for span in trace.named("read")} <= set(
        os.listdir(tmp_path / "checkpoint")
    )
    assert all(span["args"]["offset"] >= 0 for span in trace.named("read"))
    assert set(os.listdir(tmp_path)) == {"checkpoint", "load.json"}


def test_times_of_reading(tmp_path: Path) -> None:
    state = mixed_checkpoint(tmp_path)
    dcp_fast.load(state, checkpoint_id=tmp_path)
    report = last_report()
    reading_stages = report.seconds["layout"] + report.seconds["transfer"] + report.seconds["commit"]
    assert 0 < report.reading_seconds <= reading_stages
    assert report.reading_seconds <= report.wait_seconds["disk"]
    assert report.wait_seconds.keys() == {"disk", "slot", "device", "ranks"}
    assert report.wait_seconds["slot"] == report.wait_seconds["device"] == report.wait_seconds["ranks"] == 0
    assert f"{report.wait_seconds['disk']:.3f}" in str(report)


def test_reader_traces_each_of_its_loads(tmp_path: Path) -> None:
    save(tmp_path / "first", {"t": torch.ones(3)})
    save(tmp_path / "second", {"t": torch.ones(2_000_000)})
    reader = dcp_fast.FileSystemReader(tmp_path / "first", trace=tmp_path / "load.json")
    dcp.load({"t": torch.zeros(3)}, storage_reader=reader)
    Trace(tmp_path / "load.json").check(last_report())
    dcp.load({"t": torch.zeros(2_000_000)}, storage_reader=reader, checkpoint_id=tmp_path / "second")
    trace = Trace(tmp_path / "load.json")
    trace.check(last_report())
    assert {os.path.dirname(span["args"]["path"]) for span in trace.named("read")} == {str(tmp_path / "second")}
    # That of one load alone goes elsewhere, and only for that one.
    (tmp_path / "load.json").unlink()
    dcp_fast.load({"t": torch.zeros(2_000_000)}, storage_reader=reader, trace=str(tmp_path / "other.json"))
    assert not (tmp_path / "load.json").exists()
    Trace(tmp_path / "other.json").check(last_report())
    dcp_fast.load({"t": torch.zeros(2_000_000)}, storage_reader=reader)
    assert (tmp_path / "load.json").exists()


def test_planner_with_hooks(tmp_path: Path) -> None:
    class Planner(dcp_fast.DefaultLoadPlanner):
        def commit_tensor(self, *arguments: Any) -> None:
            super().commit_tensor(*arguments)

    save(tmp_path / "checkpoint", {"a": torch.ones(30), "b": torch.ones(40, dtype=torch.half), "c": "text"})
    state = {"a": torch.zeros(30), "b": torch.zeros(40), "c": None}
    dcp_fast.load(state, checkpoint_id=tmp_path / "checkpoint", planner=Planner(), trace=tmp_path / "load.json")
    trace = Trace(tmp_path / "load.json")
    trace.check(last_report())
    # All destinations are found at once, and each of the two tensors has a window of its own.
    assert len(trace.named("transfer")) == 3


def test_reader_that_torch_serves_has_stages_only(tmp_path: Path) -> None:
    class Python(dcp_fast.FileSystemReader):
        def _slice_file(self, file: Any, info: Any) -> Any:
            return super()._slice_file(file, info)

    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    reader = Python(tmp_path / "checkpoint")
    dcp_fast.load({"t": torch.zeros(3)}, storage_reader=reader, trace=tmp_path / "load.json")
    trace = Trace(tmp_path / "load.json")
    assert {span["name"] for span in trace.spans} == STAGES - {"layout"}
    assert set(trace.threads.values()) == {"load"}


# Failures of the load


def test_failing_reads_leave_a_trace(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(1_000_000)})
    trace = tmp_path / "load.json"
    with _native.FaultInjection("pread", nth=1, error_number=5):
        outcome = load_with(
            dcp_fast.load, {"t": torch.zeros(1_000_000)}, checkpoint_id=tmp_path / "checkpoint", trace=trace
        )
    assert isinstance(outcome.errors[0], dcp_fast.FileAccessError)
    assert {"metadata", "planning", "read"} <= {span["name"] for span in Trace(trace).spans}
    assert 0 in {span["args"]["bytes"] for span in Trace(trace).named("read")}


def test_failing_plan_leaves_what_came_before(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    trace = tmp_path / "load.json"
    assert load_with(
        dcp_fast.load, {"missing": torch.zeros(3)}, checkpoint_id=tmp_path / "checkpoint", trace=trace
    ).errors
    Trace(trace).check(last_report())
    assert {span["name"] for span in Trace(trace).spans} == {"planning", "metadata", "ranks"}


def test_missing_checkpoint_leaves_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "load.json"
    assert load_with(dcp_fast.load, {"t": torch.zeros(3)}, checkpoint_id=tmp_path / "missing", trace=trace).errors
    assert {span["name"] for span in Trace(trace).spans} == {"planning", "metadata", "ranks"}


def test_failing_hook_leaves_a_trace(tmp_path: Path) -> None:
    class Planner(dcp_fast.DefaultLoadPlanner):
        def load_bytes(self, *arguments: Any) -> None:
            raise RuntimeError

    save(tmp_path / "checkpoint", {"t": torch.ones(3), "u": "text"})
    state = {"t": torch.zeros(3), "u": None}
    trace = tmp_path / "load.json"
    assert load_with(dcp_fast.load, state, checkpoint_id=tmp_path / "checkpoint", planner=Planner(), trace=trace).errors
    assert {"transfer", "commit", "read"} <= {span["name"] for span in Trace(trace).spans}


# Failures of the trace


@pytest.mark.parametrize("where", ["missing/load.json", "", "file/load.json", "x" * 300])
def test_unwritable_path_is_an_error_before_anything_is_loaded(tmp_path: Path, where: str) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    (tmp_path / "file").touch()
    state = {"t": torch.zeros(3)}
    outcome = load_with(dcp_fast.load, state, checkpoint_id=tmp_path / "checkpoint", trace=tmp_path / where)
    assert isinstance(outcome.errors[0], OSError)
    assert str(tmp_path / where) in str(outcome.errors[0])
    assert torch.equal(state["t"], torch.zeros(3))


def test_what_is_not_a_regular_file_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    os.mkfifo(tmp_path / "pipe")
    outcome = load_with(
        dcp_fast.load, {"t": torch.zeros(3)}, checkpoint_id=tmp_path / "checkpoint", trace=tmp_path / "pipe"
    )
    assert isinstance(outcome.errors[0], OSError)
    assert (tmp_path / "pipe").is_fifo()
    # A link stays one.
    (tmp_path / "link.json").symlink_to("load.json")
    dcp_fast.load({"t": torch.zeros(3)}, checkpoint_id=tmp_path / "checkpoint", trace=tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    Trace(tmp_path / "load.json").check(last_report())


def test_disk_that_fills_up_does_not_cost_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    trace = tmp_path / "load.json"
    replace = os.replace

    def full(source: str, target: str) -> None:
        if Trace(Path(source)).named("read"):
            raise OSError(28, "No space left on device", target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    state = {"t": torch.zeros(3)}
    with caplog.at_level(logging.WARNING, "dcp_fast"):
        dcp_fast.load(state, checkpoint_id=tmp_path / "checkpoint", trace=trace)
    assert torch.equal(state["t"], torch.ones(3))
    assert "No space left" in caplog.text
    assert {span["name"] for span in Trace(trace).spans} == {"planning", "metadata"}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("installed", [False, True])
def test_another_reader_cannot_trace(tmp_path: Path, installed: bool) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    reader = dcp.FileSystemReader(tmp_path / "checkpoint")
    state = {"t": torch.zeros(3)}
    installation = dcp_fast.install() if installed else None
    try:
        with pytest.raises(ValueError, match=r"trace needs a dcp_fast\.FileSystemReader"):
            dcp_fast.load(state, storage_reader=reader, trace=tmp_path / "load.json")
    finally:
        if installation is not None:
            dcp_fast.uninstall()
    assert torch.equal(state["t"], torch.zeros(3))
    assert not (tmp_path / "load.json").exists()


def test_what_is_no_path_is_an_error_at_once(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(3)})
    with pytest.raises(TypeError):
        dcp_fast.load({"t": torch.zeros(3)}, checkpoint_id=tmp_path, trace=True)
    with pytest.raises(TypeError):
        dcp_fast.FileSystemReader(tmp_path, trace=True)  # type: ignore[arg-type]
    outcome = load_with(dcp_fast.load, {"t": torch.zeros(3)}, checkpoint_id=tmp_path, trace="a\0b")
    assert isinstance(outcome.errors[0], ValueError)


# Where it is reached from


def test_installed(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    with dcp_fast.install():
        dcp.load({"t": torch.zeros(3)}, checkpoint_id=tmp_path / "checkpoint", trace=tmp_path / "load.json")  # type: ignore[call-arg]
    Trace(tmp_path / "load.json").check(last_report())


def test_reader_as_the_second_argument(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    reader = dcp_fast.FileSystemReader(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="argument order"):
        dcp_fast.load({"t": torch.zeros(3)}, reader, trace=tmp_path / "load.json")  # type: ignore[misc]
    Trace(tmp_path / "load.json").check(last_report())


def test_optimizer_state(tmp_path: Path, gloo: None) -> None:
    save(tmp_path / "checkpoint", {"optim": {"state": {"w": {"exp_avg": torch.ones(50)}}}})
    reader = dcp_fast.FileSystemReader(tmp_path / "checkpoint", trace=tmp_path / "{rank}.json")
    dcp_fast.load_sharded_optimizer_state_dict({}, "optim", reader)
    trace = Trace(tmp_path / "0.json")
    trace.check(last_report())
    assert {"metadata", "planning", "transfer"} <= {span["name"] for span in trace.spans}
    assert trace.processes == {0: "rank 0"}


def test_nothing_is_made_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = mixed_checkpoint(tmp_path)

    def never(*arguments: Any) -> None:
        raise AssertionError("nobody asked for a trace")

    monkeypatch.setattr(_native, "TraceRecorder", never)
    monkeypatch.setattr(trace_module.Timeline, "write", never)
    before = sorted(os.listdir(tmp_path))
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_report_of_a_traced_load_can_be_sent(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(3)})
    dcp_fast.load({"t": torch.zeros(3)}, checkpoint_id=tmp_path / "checkpoint", trace=tmp_path / "load.json")
    assert pickle.loads(pickle.dumps(last_report())) == last_report()


# Several ranks


def load_on_rank(path: Path, trace: str) -> dcp_fast.LoadReport:
    dcp_fast.load({"t": torch.zeros(1000)}, checkpoint_id=path, trace=trace)
    return last_report()


def fail_on_rank(path: Path, traces: list[str]) -> list[tuple[int, type[BaseException]]]:
    state = {"t": torch.zeros(1000)}
    outcome = load_with(dcp_fast.load, state, checkpoint_id=path, trace=traces[dist.get_rank()])
    assert torch.equal(state["t"], torch.zeros(1000))
    return [(rank, type(error)) for rank, error in (outcome.errors or {}).items()]


@pytest.mark.parametrize(
    ("name", "files"),
    [("load.json", ["load.json", "load.json.rank1"]), ("at-{rank}.json", ["at-0.json", "at-1.json"])],
)
def test_each_rank_writes_its_own(tmp_path: Path, ranks: Ranks, name: str, files: list[str]) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(1000)})
    reports = ranks.run(2, load_on_rank, tmp_path / "checkpoint", str(tmp_path / name))
    assert sorted(file.name for file in tmp_path.glob("*json*")) == sorted(files)
    for rank, (file, report) in enumerate(zip(files, reports, strict=True)):
        trace = Trace(tmp_path / file)
        trace.check(report)
        assert trace.processes == {rank: f"rank {rank}"}


def test_unwritable_path_of_one_rank_is_an_error_of_all(tmp_path: Path, ranks: Ranks) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(1000)})
    traces = [str(tmp_path / "load.json"), str(tmp_path / "missing" / "load.json")]
    results = ranks.run(2, fail_on_rank, tmp_path / "checkpoint", traces)
    assert results == [[(1, FileNotFoundError)]] * 2
