"""Whom an installation reaches: whoever has torch's classes and functions, however and whenever it got them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import fill, image, load_with, save
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.metadata import Metadata

import dcp_fast

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op.* is deprecated:FutureWarning")


class Phase(Enum):
    """A type that nobody has allowed."""

    WARM_UP = 1


# What a framework makes of torch's names when it is imported, which is before any installation of these tests.


class CachedReader(dcp.FileSystemReader):
    cached: ClassVar[dict[str, Metadata]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if str(self.path) not in self.cached:
            self.cached[str(self.path)] = super().read_metadata(*args, **kwargs)
        return self.cached[str(self.path)]


class RenamingPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(dict(state_dict), metadata, is_coordinator)
        self.original_state_dict = state_dict

    def create_local_plan(self) -> Any:
        return super().create_local_plan()


class KeptMethodsReader(dcp.FileSystemReader):
    read_metadata = dcp.FileSystemReader.read_metadata


class KeptMethodsPlanner(dcp.DefaultLoadPlanner):
    load_bytes = dcp.DefaultLoadPlanner.load_bytes


class DefaultsPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any, torchs: Any = dcp.DefaultLoadPlanner.load_bytes) -> None:
        torchs(self, read_item, value)


class Kept:
    reader = dcp.FileSystemReader
    load = staticmethod(dcp.load)


KEPT = {"load": dcp.load, "reader": dcp.FileSystemReader, "planner": dcp.DefaultLoadPlanner}
KEPT_INNER = {"load": state_dict_loader._load_state_dict}


def load_by_default(state: Any, path: Path, reader: Any = dcp.FileSystemReader, load: Any = dcp.load) -> None:
    load(state, storage_reader=reader(path))


def make_closure() -> Callable[[Any, Path], None]:
    load, reader = dcp.load, dcp.FileSystemReader
    return lambda state, path: load(state, storage_reader=reader(path))


CLOSURE = make_closure()


def by_existing_objects(path: Path) -> Callable[[Any, Path], None]:
    reader, planner = dcp.FileSystemReader(path), dcp.DefaultLoadPlanner()
    return lambda state, path: dcp.load(state, storage_reader=reader, planner=planner)


WAYS: dict[str, Callable[[Any, Path], None]] = {
    "module": lambda state, path: dcp.load(state, checkpoint_id=path),
    "subclass of the reader": lambda state, path: dcp.load(state, storage_reader=CachedReader(path)),
    "subclass of the planner": lambda state, path: dcp.load(state, checkpoint_id=path, planner=RenamingPlanner()),
    "methods": lambda state, path: dcp.load(
        state, storage_reader=KeptMethodsReader(path), planner=KeptMethodsPlanner()
    ),
    "method in a default": lambda state, path: dcp.load(
        state, storage_reader=KeptMethodsReader(path), planner=DefaultsPlanner()
    ),
    "dict": lambda state, path: KEPT["load"](state, storage_reader=KEPT["reader"](path), planner=KEPT["planner"]()),
    "inner": lambda state, path: KEPT_INNER["load"](state, KEPT["reader"](path), no_dist=True),
    "class attributes": lambda state, path: Kept.load(state, storage_reader=Kept.reader(path)),
    "defaults": load_by_default,
    "closure": CLOSURE,
}


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    CachedReader.cached.clear()
    yield
    dcp_fast.uninstall()


STORED = {"t": fill((300, 5), torch.float32), "n": {"x": 4, "u": fill((7,), torch.int8)}}


def zeros() -> dict[str, Any]:
    return {"t": torch.zeros(300, 5), "n": {"x": 0, "u": torch.zeros(7, dtype=torch.int8)}}


def loaded_by_us(way: Callable[[Any, Path], None], path: Path) -> bool:
    """Load a state dict, compare it, and tell whether the engine did it."""
    before = dcp_fast.last_report()
    state = zeros()
    way(state, path)
    assert image(state) == image(STORED)
    report = dcp_fast.last_report()
    if report is before:
        return False
    assert report is not None
    assert report.path == str(path)
    assert report.reader_fallback_reason == ""
    assert report.records == 3
    return True


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_are_reached_and_left_again(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "ckpt", STORED)
    way = WAYS[name]
    assert not loaded_by_us(way, path)
    CachedReader.cached.clear()
    with dcp_fast.install():
        assert loaded_by_us(way, path)
        if name not in ("inner", "method in a default"):  # which has a hook of its own
            report = dcp_fast.last_report()
            assert report is not None
            assert report.is_fast, report.planner_fallback_reason
    CachedReader.cached.clear()
    assert not loaded_by_us(way, path)


def test_objects_that_exist_already(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", STORED)
    way = by_existing_objects(path)
    assert not loaded_by_us(way, path)
    with dcp_fast.install():
        assert loaded_by_us(way, path)
        made_within = by_existing_objects(path)
        assert loaded_by_us(made_within, path)
    assert not loaded_by_us(way, path)
    assert not loaded_by_us(made_within, path)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_trust_alike(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "ckpt", {**STORED, "phase": Phase.WARM_UP})

    def refuses() -> bool:
        CachedReader.cached.clear()
        state = {**zeros(), "phase": None}
        errors = load_with(WAYS[name], state, path=path).errors
        if errors is None:
            assert state["phase"] is Phase.WARM_UP
            return False
        assert isinstance(errors[0], dcp_fast.UntrustedBytesError)
        return True

    assert not refuses()
    with dcp_fast.install():
        assert refuses()
    with dcp_fast.install(trust_bytes=True):
        assert not refuses()
    assert not refuses()


class Runs:
    """Metadata that leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", WAYS)
def test_no_way_runs_what_metadata_names(tmp_path: Path, name: str) -> None:
    path, marker = save(tmp_path / "ckpt", STORED), tmp_path / "ran"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = Runs(marker)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with dcp_fast.install():
        assert load_with(WAYS[name], zeros(), path=path).errors
    assert not marker.exists()
    with dcp_fast.install(trust_metadata=True):
        assert load_with(WAYS[name], zeros(), path=path).errors is None
    assert marker.exists(), "the proof that it would"


def test_conversion_to_torch_save_runs_nothing(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = save(tmp_path / "ckpt", {"phase": Phase.WARM_UP})
    with dcp_fast.install():
        with pytest.raises(dcp.api.CheckpointException) as info:
            dcp_to_torch_save(path, tmp_path / "saved.pt")
        assert isinstance(info.value.failures[0][0], dcp_fast.UntrustedBytesError)
    dcp_to_torch_save(path, tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=False) == {"phase": Phase.WARM_UP}


def test_planners_and_readers_can_be_sent(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", STORED)
    with dcp_fast.install():
        planner, reader, function = pickle.loads(
            pickle.dumps((dcp.DefaultLoadPlanner(), dcp.FileSystemReader(path), dcp.load))
        )
        assert type(planner) is dcp.DefaultLoadPlanner
        assert loaded_by_us(lambda state, path: function(state, storage_reader=reader, planner=planner), path)
        sent = pickle.dumps((planner, reader, function))
    planner, reader, function = pickle.loads(sent)
    assert function is dcp.load
    assert not loaded_by_us(lambda state, path: function(state, storage_reader=reader, planner=planner), path)


def test_method_that_somebody_replaced_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "ckpt", {**STORED, "phase": Phase.WARM_UP})
    seen: list[str] = []
    torchs = dcp.DefaultLoadPlanner.load_bytes

    def spying(self: Any, read_item: Any, value: Any) -> None:
        seen.append(read_item.dest_index.fqn)
        torchs(self, read_item, value)

    monkeypatch.setattr(dcp.DefaultLoadPlanner, "load_bytes", spying)
    with dcp_fast.install(trust_bytes=True):
        dcp.load({**zeros(), "phase": None}, checkpoint_id=path)
    assert sorted(seen) == ["n.x", "phase"]
    assert dcp.DefaultLoadPlanner.load_bytes is spying


def test_method_that_somebody_replaces_meanwhile(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", STORED)
    torchs = dcp.FileSystemReader.read_data
    dcp_fast.install()
    ours = dcp.FileSystemReader.read_data

    def somebody_elses(self: Any, plan: Any, planner: Any) -> Any:
        return ours(self, plan, planner)

    try:
        dcp.FileSystemReader.read_data = somebody_elses
        report_of = loaded_by_us(WAYS["module"], path)
        assert report_of, "their method calls ours"
        dcp_fast.uninstall()
        assert dcp.FileSystemReader.read_data is somebody_elses
        assert not loaded_by_us(WAYS["dict"], path), "ours hands on to torch's now"
    finally:
        dcp.FileSystemReader.read_data = torchs


def test_method_that_is_put_back_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "ckpt", STORED)
    torchs = dcp.FileSystemReader.read_data
    dcp_fast.install()
    with monkeypatch.context() as patched:
        patched.setattr(dcp.FileSystemReader, "read_data", torchs)
        dcp_fast.uninstall()
    assert dcp.FileSystemReader.read_data is not torchs, "what it was when it was patched"
    assert not loaded_by_us(WAYS["dict"], path)
    with dcp_fast.install():
        assert loaded_by_us(WAYS["dict"], path)
    dcp.FileSystemReader.read_data = torchs


def test_values_with_a_state_dict_of_their_own(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    save(tmp_path, {"model": model.state_dict()})
    other = torch.nn.Linear(3, 2)
    with dcp_fast.install():
        KEPT["load"]({"model": other}, checkpoint_id=tmp_path)
    assert image(dict(other.state_dict())) == image(dict(model.state_dict()))


def test_threads(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", STORED)
    failures: list[BaseException] = []
    over = threading.Event()

    def load() -> None:
        try:
            while not over.is_set():
                state = zeros()
                KEPT["load"](state, storage_reader=KEPT["reader"](path), no_dist=True)
                assert image(state) == image(STORED)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        with dcp_fast.install():
            WAYS["subclass of the reader"](zeros(), path)
    over.set()
    for thread in threads:
        thread.join()
    assert not failures
