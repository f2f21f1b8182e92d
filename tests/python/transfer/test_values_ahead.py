"""Plain values of bytes entries are read natively for planners with hooks, too, and come in torch's order."""

from __future__ import annotations

import io
from collections import ChainMap, OrderedDict, UserDict
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import fast_reader, image, load_with, torch_load, torch_reader
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast
from dcp_fast import _native
from dcp_fast.transfer import values_ahead
from dcp_fast.transfer.records import Records

COUNT = 3000
Seen = list[tuple[str, Any]]


def values(count: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for i in range(count):
        state[f"v{i:04}"] = (i, f"{i}") if i % 3 else float(i)
        if i % 500 == 250:
            state[f"t{i:04}"] = torch.full((3, 2), float(i))
            state[f"v{i:04}.dict"] = (OrderedDict(a=i), "which is not plain")
    return state


def nothing(count: int) -> dict[str, Any]:
    return {name: torch.zeros(3, 2) if name[0] == "t" else None for name in values(count)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values") / "ckpt"
    dcp.save(values(COUNT), checkpoint_id=path, no_dist=True)
    return path


class Looking(dcp.DefaultLoadPlanner):
    """Notes which values are there when a tensor is committed."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._note = seen.append

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self._note((item.dest_index.fqn, sum(value is not None for value in self.original_state_dict.values())))


class Resolving(Looking):
    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item)


class Renaming(Looking):
    """Puts what comes later elsewhere."""

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(item, tensor)
        self.mappings["v2999"] = ("elsewhere",)


@pytest.mark.parametrize("planner", [Looking, Resolving, Renaming])
def test_values_come_in_torchs_order(stored: Path, planner: Any) -> None:
    seen: list[Seen] = [[], []]
    states = [nothing(COUNT), nothing(COUNT)]
    theirs = load_with(torch_load, states[0], storage_reader=torch_reader(stored), planner=planner(seen[0]))
    ours = load_with(dcp_fast.load, states[1], storage_reader=fast_reader(stored), planner=planner(seen[1]))
    assert theirs.errors is ours.errors is None
    assert image(states[1]) == image(states[0])
    assert seen[1] == seen[0]
    assert len(seen[0]) == COUNT // 500
    assert (states[0]["v2999"] is None) == (planner is Renaming)


@pytest.mark.parametrize("planner", [Looking, Resolving])
def test_they_are_read_natively(stored: Path, planner: Any) -> None:
    read = Records.read
    others: list[str] = []

    def read_one(self: Records, item: ReadItem, *args: Any) -> io.BytesIO:
        others.append(item.dest_index.fqn)
        return read(self, item, *args)

    state = nothing(COUNT)
    with mock.patch.object(Records, "read", read_one):
        dcp_fast.load(state, storage_reader=fast_reader(stored), planner=planner([]))
    assert sorted(others) == sorted(name for name in state if name.endswith(".dict"))
    report = dcp_fast.last_report()
    assert report is not None
    dcp_fast.load(nothing(COUNT), storage_reader=fast_reader(stored))
    without = dcp_fast.last_report()
    assert without is not None
    assert report.bytes_needed == without.bytes_needed


def test_a_hook_gets_all_of_them(stored: Path) -> None:
    class Taking(dcp.DefaultLoadPlanner):
        taken = 0

        def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
            Taking.taken += 1
            super().load_bytes(item, value)

    state = nothing(COUNT)
    dcp_fast.load(state, storage_reader=fast_reader(stored), planner=Taking())
    assert Taking.taken == COUNT + COUNT // 500
    assert image(state) == image(values(COUNT))


@pytest.mark.parametrize("planner", [Looking, Resolving])
def test_reads_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planner: Any) -> None:
    """All values are there whose turn came before that of the record that cannot be read, and no others."""
    monkeypatch.setattr(values_ahead, "_MOST_RECORDS", 7)
    dcp.save(values(300), checkpoint_id=tmp_path, no_dist=True)
    turns: list[str] = []

    class Noting(dcp.DefaultLoadPlanner):
        def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
            turns.append(item.dest_index.fqn)
            super().load_bytes(item, value)

    torch_load(nothing(300), storage_reader=torch_reader(tmp_path), planner=Noting())
    assert len(turns) == 301

    def load(used: Any) -> None:
        dcp_fast.load(nothing(300), storage_reader=fast_reader(tmp_path, io="cached", threads=1), planner=used)

    with _native.FaultInjection("pread", nth=-1) as counter:
        load(planner([]))
    counts = set()
    for nth in range(0, counter.calls, max(1, counter.calls // 40)):
        used = planner([])
        faults = _native.FaultInjection("pread", nth, error_number=5, repeat=1 << 30)
        with faults, pytest.raises(dcp.api.CheckpointException) as caught:
            load(used)
        state = getattr(used, "original_state_dict", {})  # values go into the caller's own at the end
        (failure,) = caught.value.failures.values()
        assert isinstance(failure[0], dcp_fast.LoadError)
        there = {name for name, value in state.items() if value is not None and name[0] == "v"}
        assert there == set(turns[: len(there)])
        assert image({name: state[name] for name in there}) == image({name: values(300)[name] for name in there})
        counts.add(len(there))
    assert len(counts) > 10


class Committing(dcp_fast.DefaultLoadPlanner):
    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(item, tensor)


class ResolvingToo(Committing):
    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item)


class Loading(Committing):
    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(item, value)


@pytest.mark.parametrize("planner", [dcp_fast.DefaultLoadPlanner, Committing, ResolvingToo, Loading])
@pytest.mark.parametrize("reader", [fast_reader, torch_reader])
def test_all_entries_that_are_refused_are_told_at_once(tmp_path: Path, planner: Any, reader: Any) -> None:
    stored = {
        "a": (UserDict(),),
        "b": 5,
        "c": (ChainMap(),),
        "d": torch.arange(3),
        "e": (IPv4Address(7),),
    }
    dcp.save(stored, checkpoint_id=tmp_path, no_dist=True)

    def load() -> dict[str, Any]:
        state = dict.fromkeys(stored, None) | {"d": torch.zeros(3, dtype=torch.int64)}
        dcp_fast.load(state, storage_reader=reader(tmp_path), planner=planner(), no_dist=True)
        return state

    with pytest.raises(dcp.api.CheckpointException) as caught:
        load()
    (failure,) = caught.value.failures.values()
    assert isinstance(failure[0], dcp_fast.UntrustedBytesError)
    assert "'c', 'e'" in failure[0].reason or "'e', 'c'" in failure[0].reason
    with torch.serialization.safe_globals([UserDict, ChainMap, IPv4Address]):
        assert image(load()) == image(stored)
