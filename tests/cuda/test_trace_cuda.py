"""The timeline of a load to GPUs: copies and launches on tracks of their own, in the time of the host."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from helpers import save

import dcp_fast


def tracks_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def test_copies_and_launches(cuda: torch.device, tmp_path: Path) -> None:
    stored = {"whole": torch.randn(1500, 1000), "gaps": torch.randn(300, 50)}
    save(tmp_path / "checkpoint", stored)
    state = {"whole": torch.zeros(1500, 1000, device=cuda), "gaps": torch.zeros(300, 60, device=cuda)[:, :50]}
    dcp_fast.load(state, checkpoint_id=tmp_path / "checkpoint", trace=tmp_path / "load.json")
    report = dcp_fast.last_report()
    assert report is not None
    assert all(torch.equal(state[key].cpu(), stored[key]) for key in stored)

    tracks = tracks_of(tmp_path / "load.json")
    copies, kernels = tracks["cuda:0 copy"], tracks["cuda:0 kernel"]
    assert sum(event["args"]["bytes"] for event in copies) == report.bytes_to_device
    assert len(kernels) == report.launches == 1
    # Each lies within the stage that it is a part of, but for what the two clocks differ.
    tolerance = 20_000
    stages = [event for event in tracks["load"] if event["name"] == "transfer"]
    begin, end = stages[0]["ts"], stages[-1]["ts"] + stages[-1]["dur"]
    for event in copies + kernels:
        assert event["dur"] >= 0
        assert begin - tolerance <= event["ts"] <= event["ts"] + event["dur"] <= end + tolerance
    assert min(event["ts"] for event in kernels) >= min(event["ts"] for event in copies)
    host = {event["name"] for name, track in tracks.items() if name.startswith("reader") for event in track}
    assert {"read", "wait for slot", "enqueue"} <= host


def test_the_next_load_is_not_traced(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", {"t": torch.ones(100_000)})
    state = {"t": torch.zeros(100_000, device=cuda)}
    reader = dcp_fast.FileSystemReader(tmp_path / "checkpoint", synchronize=False)
    dcp_fast.load(state, storage_reader=reader, trace=tmp_path / "load.json")
    before = (tmp_path / "load.json").read_bytes()
    dcp_fast.load(state, storage_reader=reader)
    torch.cuda.synchronize()
    assert torch.equal(state["t"].cpu(), torch.ones(100_000))
    assert (tmp_path / "load.json").read_bytes() == before
