"""Installing dcp_fast in the place of torch's classes, and undoing it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import fill, image, save
from torch.distributed.checkpoint import default_planner, filesystem, planner_helpers, state_dict_loader
from torch.distributed.checkpoint.stateful import Stateful

import dcp_fast

# An object in torch that warns when it is merely looked at.
pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op.* is deprecated:FutureWarning")

NAMES = [
    (dcp, "load"),
    (dcp, "load_state_dict"),
    (filesystem.FileSystemReader, "read_metadata"),
    (filesystem.FileSystemReader, "read_data"),
    (default_planner.DefaultLoadPlanner, "set_up_planner"),
    (default_planner.DefaultLoadPlanner, "create_local_plan"),
    (default_planner.DefaultLoadPlanner, "load_bytes"),
    (default_planner, "create_default_local_load_plan"),
    (planner_helpers, "create_read_items_for_chunk_list"),
    (state_dict_loader, "load"),
    (state_dict_loader, "load_state_dict"),
    (state_dict_loader, "_load_state_dict"),
    (state_dict_loader, "Stateful"),
    (importlib.import_module("torch.distributed.checkpoint.optimizer"), "create_read_items_for_chunk_list"),
    (dcp, "load_sharded_optimizer_state_dict"),
    (importlib.import_module("torch.distributed.checkpoint.optimizer"), "load_sharded_optimizer_state_dict"),
    (importlib.import_module("torch.distributed.checkpoint.format_utils"), "_load_state_dict"),
]


TORCHS_READ_DATA = filesystem.FileSystemReader.read_data


def snapshot() -> dict[tuple[str, str], Any]:
    """Every attribute of every module of torch and of this one, by identity."""
    return {
        (module_name, name): value
        for module_name, module in list(sys.modules.items())
        if module is not None and module_name.partition(".")[0] in {"torch", "framework", __name__}
        for name, value in list(vars(module).items())
    }


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = snapshot()
    yield
    dcp_fast.uninstall()
    after = snapshot()
    changed = [key for key in before if key in after and after[key] is not before[key]]
    assert not [key for key in changed if any(ours(value) for value in (after[key], before[key]))]


def ours(value: object) -> bool:
    if isinstance(value, type):
        return value.__module__.startswith("dcp_fast")
    if isinstance(value, types.ModuleType):
        return type(value).__module__.startswith("dcp_fast")
    return isinstance(value, types.FunctionType) and value.__globals__["__name__"].startswith("dcp_fast")


@pytest.fixture
def framework() -> Iterator[types.ModuleType]:
    """A module that imported torch's functions by name before dcp_fast was installed."""
    module = types.ModuleType("framework")
    exec(
        "from torch.distributed.checkpoint import load as load_checkpoint, FileSystemReader as Reader\n"
        "import torch.distributed.checkpoint as dcp\n"
        "class Derived(Reader): pass\n"
        "def resume(state, path): load_checkpoint(state, storage_reader=Reader(path))\n",
        vars(module),
    )
    sys.modules["framework"] = module
    yield module
    del sys.modules["framework"]


def test_all_names_are_replaced_and_restored() -> None:
    originals = [getattr(module, name) for module, name in NAMES]
    assert not any(ours(value) for value in originals)
    dcp_fast.install()
    for module, name in NAMES:
        assert ours(getattr(module, name)), (module.__name__, name)
    dcp_fast.uninstall()
    for (module, name), original in zip(NAMES, originals, strict=True):
        assert getattr(module, name) is original


def test_everything_else_stays() -> None:
    dcp_fast.install()
    dcp_fast.uninstall()  # modules that install imports are there from now on
    before = snapshot()
    with dcp_fast.install():
        during = snapshot()
    after = snapshot()
    assert {key for key in before if during[key] is not before[key]} <= {
        key for key, value in during.items() if ours(value)
    }
    assert [key for key in before if after[key] is not before[key]] == []


def test_twice_is_once() -> None:
    original = dcp.load
    dcp_fast.install()
    replaced = dcp.load
    dcp_fast.install()
    assert dcp.load is replaced
    dcp_fast.uninstall()
    assert dcp.load is original
    dcp_fast.uninstall()
    assert dcp.load is original


def test_nested_context_managers() -> None:
    original = dcp.load
    with dcp_fast.install():
        replaced = dcp.load
        assert replaced is not original
        with dcp_fast.install():
            assert dcp.load is replaced
        assert dcp.load is replaced
    assert dcp.load is original


def test_context_manager_within_an_installation() -> None:
    dcp_fast.install()
    with dcp_fast.install():
        pass
    assert ours(dcp.load)


def test_context_manager_that_is_used_again() -> None:
    original = dcp.load
    installation = dcp_fast.install()
    with installation:
        assert dcp.load is not original
    assert dcp.load is original
    dcp_fast.install()
    with installation:
        pass
    assert dcp.load is not original, "it undoes what its own call did, once"


def test_exception_within() -> None:
    original = dcp.load
    with pytest.raises(KeyError), dcp_fast.install():
        raise KeyError
    assert dcp.load is original


def test_uninstall_within() -> None:
    original = dcp.load
    with dcp_fast.install():
        dcp_fast.uninstall()
        assert dcp.load is original
    assert dcp.load is original


def test_name_that_somebody_else_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def somebody_elses(*args: Any, **kwargs: Any) -> None: ...

    original = dcp.load
    dcp_fast.install()
    dcp.load = somebody_elses
    dcp_fast.uninstall()
    assert dcp.load is somebody_elses
    dcp.load = original


def test_names_that_were_imported_before(framework: types.ModuleType, tmp_path: Path) -> None:
    stored = {"t": fill((3,), torch.float32), "n": 4}
    save(tmp_path, stored)
    original, load = framework.Reader, framework.load_checkpoint
    before = dcp_fast.last_report()
    with dcp_fast.install():
        assert framework.Reader is original
        assert framework.load_checkpoint is not load
        state = {"t": torch.zeros(3), "n": 0}
        framework.resume(state, tmp_path)
    assert dcp_fast.last_report() is not before
    assert image(state) == image(stored)
    assert framework.load_checkpoint is load
    assert framework.Derived.__bases__ == (original,)


def test_modules_that_were_imported_in_between(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((3,), torch.float32)})
    module = types.ModuleType("framework")
    sys.modules["framework"] = module
    try:
        original = dcp.load
        with dcp_fast.install():
            exec("from torch.distributed.checkpoint import load\nkept = {'load': load}", vars(module))
            exec("from dcp_fast import load as fast_load", vars(module))
            exec("from torch.distributed.checkpoint.state_dict_loader import Stateful", vars(module))
            assert module.Stateful is not Stateful
        assert module.load is original
        assert module.fast_load is dcp_fast.load
        assert module.Stateful is Stateful
        before = dcp_fast.last_report()
        module.kept["load"]({"t": torch.zeros(3)}, checkpoint_id=tmp_path)
        assert dcp_fast.last_report() is before
    finally:
        del sys.modules["framework"]


def test_load_without_arguments(tmp_path: Path) -> None:
    stored = {"t": fill((3,), torch.float32), "n": 4}
    save(tmp_path, stored)

    def loaded_by_us() -> bool:
        before = dcp_fast.last_report()
        state = {"t": torch.zeros(3), "n": 0}
        dcp.load(state, checkpoint_id=tmp_path)
        assert image(state) == image(stored)
        return dcp_fast.last_report() is not before

    assert not loaded_by_us()
    with dcp_fast.install():
        assert loaded_by_us()
    assert not loaded_by_us()


def test_planning_functions_are_used_by_planners_of_others(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((3,), torch.float32)})

    class Planner(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> dcp.LoadPlan:
            return default_planner.create_default_local_load_plan(self.state_dict, self.metadata)

    with dcp_fast.install():
        state = {"t": torch.zeros(3)}
        dcp.load(state, checkpoint_id=tmp_path, planner=Planner())
        assert state["t"].count_nonzero() > 0
    report = dcp_fast.last_report()
    assert report is not None
    assert report.is_fast


def test_type_checks_keep_their_meaning(tmp_path: Path) -> None:
    with dcp_fast.install():
        reader = dcp.FileSystemReader(tmp_path)
        assert type(reader) is filesystem.FileSystemReader
        assert not isinstance(reader, dcp_fast.FileSystemReader)
        assert isinstance(dcp_fast.FileSystemReader(tmp_path), dcp.FileSystemReader)
        assert isinstance(dcp_fast.DefaultLoadPlanner(), dcp.DefaultLoadPlanner)
        assert issubclass(type("Protocolled", (dcp_fast.FileSystemReader, Stateful), {}), dcp.StorageReader)
        assert not issubclass(type("Other", (dcp.StorageReader,), {}), dcp.FileSystemReader)
        assert not isinstance(3, dcp.StorageReader)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (filesystem.FileSystemReader, "read_metadata"),
        (filesystem.FileSystemReader, "read_data"),
        (default_planner.DefaultLoadPlanner, "set_up_planner"),
        (default_planner.DefaultLoadPlanner, "create_local_plan"),
    ],
)
def test_what_somebody_patched_into_torch(
    cls: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called as often as without dcp_fast."""
    save(tmp_path, {"t": fill((4, 3), torch.float32)})
    original = getattr(cls, name)
    calls: list[str] = []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(cls, name, patched)

    def count() -> int:
        calls.clear()
        state = {"t": torch.zeros(4, 3)}
        planner = dcp.DefaultLoadPlanner()
        dcp.load(state, storage_reader=filesystem.FileSystemReader(tmp_path), planner=planner)
        assert image(state["t"]) == image(fill((4, 3), torch.float32))
        return len(calls)

    before = count()
    with dcp_fast.install():
        assert count() == before > 0
    assert count() == before
    assert getattr(cls, name) is patched


def test_a_class_that_is_accelerated_twice() -> None:
    class Reader(filesystem.FileSystemReader):
        def read_data(self, *args: Any) -> Any:
            raise NotImplementedError

    before = dict(vars(Reader))
    torchs = filesystem.FileSystemReader.read_data
    dcp_fast.install(accelerate=[Reader, Reader, filesystem.FileSystemReader])
    dcp_fast.uninstall()
    assert dict(vars(Reader)) == before
    assert filesystem.FileSystemReader.read_data is torchs


def test_an_installation_ends_only_itself() -> None:
    with dcp_fast.install():
        dcp_fast.uninstall()
        other = dcp_fast.install()
    assert filesystem.FileSystemReader.read_data is not TORCHS_READ_DATA
    with other:
        pass
    assert filesystem.FileSystemReader.read_data is TORCHS_READ_DATA


@pytest.mark.parametrize("state", [None, [1], 5])
def test_state_that_is_no_dict(tmp_path: Path, state: Any) -> None:
    """torch's type of error."""
    save(tmp_path, {"t": fill((3,), torch.float32)})
    for load in (dcp.load, dcp_fast.load):
        with pytest.raises(AttributeError):
            load(state, checkpoint_id=tmp_path)
