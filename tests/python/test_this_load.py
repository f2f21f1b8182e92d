"""Options of one load hold for it alone, also while another thread loads with the same reader."""

from __future__ import annotations

import enum
import itertools
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import fill, image, save

import dcp_fast

STORED = {"t": fill((300, 20), torch.float32), "n": 4}
TIMEOUT = 60
# The first two are what came before the reader began the timeline.
FIRST_STAGES = ["metadata", "planning", "metadata", "planning", "ranks"]


def zeros() -> dict[str, Any]:
    return {"t": torch.zeros(300, 20), "n": 0}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", dict(STORED))


class Planner(dcp_fast.DefaultLoadPlanner):
    """Calls a function in the middle of a load: the metadata is read, no tensor is."""

    def __init__(self, midway: Callable[[], Any]) -> None:
        super().__init__()
        self.midway = midway

    def create_local_plan(self) -> Any:
        self.midway()
        return super().create_local_plan()


class Thread(threading.Thread):
    """Runs a function in the background. ``get`` waits for it, and raises what it raised."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self.call = lambda: function(*args, **kwargs)
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error

    def get(self) -> None:
        self.join(TIMEOUT)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


def stages_of(trace: Path) -> list[str]:
    """The stages of a load, each as often as it was entered from another one."""
    content = json.loads(trace.read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}
    stages = [e["name"] for e in content["traceEvents"] if e["ph"] == "X" and tracks[e["tid"]] == "load"]
    return [name for name, _ in itertools.groupby(stages)]


def test_threads_trace_with_one_reader(stored: Path, tmp_path: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored)
    both_are_midway = threading.Barrier(3)
    traces: list[Path | None] = [tmp_path / "a.json", tmp_path / "b.json", None]
    states = [zeros() for _ in traces]

    def midway() -> None:
        both_are_midway.wait(TIMEOUT)
        assert reader.trace is None

    threads = [
        Thread(dcp_fast.load, state, storage_reader=reader, planner=Planner(midway), trace=trace, no_dist=True)
        for state, trace in zip(states, traces, strict=True)
    ]
    for thread in threads:
        thread.get()
    assert all(image(state) == image(STORED) for state in states)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "a.json", "b.json"}
    for trace in filter(None, traces):
        stages = stages_of(trace)
        assert stages[:5] == FIRST_STAGES
        assert set(stages[5:]) == {"planning", "layout", "transfer", "commit", "ranks"}
        reads = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "read"]
        assert sum(e["args"]["bytes"] for e in reads) > STORED["t"].nbytes  # type: ignore[attr-defined]


def test_threads_trust_metadata_with_one_reader(stored: Path) -> None:
    file = stored / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = {**metadata.planner_data, "colour": Colour.RED}
    file.write_bytes(pickle.dumps(metadata))
    reader = dcp_fast.FileSystemReader(stored)
    is_midway, may_go_on = threading.Event(), threading.Event()

    def midway() -> None:
        is_midway.set()
        assert may_go_on.wait(TIMEOUT)

    state = zeros()
    trusting = Thread(
        dcp_fast.load, state, storage_reader=reader, planner=Planner(midway), trust_metadata=True, no_dist=True
    )
    try:
        assert is_midway.wait(TIMEOUT)
        with pytest.raises(dcp.api.CheckpointException) as caught:
            dcp_fast.load(zeros(), storage_reader=reader, no_dist=True)
        assert isinstance(caught.value.failures[0][0], dcp_fast.UntrustedMetadataError)
        with pytest.raises(dcp_fast.UntrustedMetadataError):
            reader.read_metadata()
    finally:
        may_go_on.set()
    trusting.get()
    assert image(state) == image(STORED)


class Colour(enum.Enum):
    """Not inert: a class of one's own."""

    RED = 1


def test_a_load_within_a_load_has_options_of_its_own(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "ckpt", {"colour": Colour.RED})
    reader, inner = dcp_fast.FileSystemReader(checkpoint), dcp_fast.DefaultLoadPlanner()
    errors = []

    def midway() -> None:
        with pytest.raises(dcp.api.CheckpointException) as caught:
            dcp_fast.load({"colour": None}, storage_reader=reader, planner=inner, no_dist=True)
        errors.append(caught.value.failures[0][0])
        assert not planner.trust_bytes

    planner = Planner(midway)
    state: dict[str, Any] = {"colour": None}
    dcp_fast.load(
        state, storage_reader=reader, planner=planner, trust_bytes=True, trace=tmp_path / "load.json", no_dist=True
    )
    assert state["colour"] is Colour.RED
    assert [type(error) for error in errors] == [dcp_fast.UntrustedBytesError]
    assert stages_of(tmp_path / "load.json")[:5] == FIRST_STAGES


def test_an_option_ends_with_its_load(stored: Path, tmp_path: Path) -> None:
    reader = dcp_fast.FileSystemReader(stored, trace=tmp_path / "reader.json")
    for state in (zeros(), {"missing": torch.zeros(1)}):
        trace = tmp_path / f"{next(iter(state))}.json"
        try:
            dcp_fast.load(state, storage_reader=reader, trace=trace, no_dist=True)
        except dcp.api.CheckpointException:
            assert "missing" in state
        assert trace.exists()
        assert not (tmp_path / "reader.json").exists()
    dcp_fast.load(zeros(), storage_reader=reader, no_dist=True)
    assert (tmp_path / "reader.json").exists()
