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
    (dcp, "FileSystemReader"),
    (dcp, "DefaultLoadPlanner"),
    (dcp, "load"),
    (dcp, "load_state_dict"),
    (filesystem, "FileSystemReader"),
    (default_planner, "DefaultLoadPlanner"),
    (default_planner, "create_default_local_load_plan"),
    (planner_helpers, "create_read_items_for_chunk_list"),
    (state_dict_loader, "load"),
    (state_dict_loader, "load_state_dict"),
    (state_dict_loader, "DefaultLoadPlanner"),
    (importlib.import_module("torch.distributed.checkpoint._storage_utils"), "FileSystemReader"),
    (importlib.import_module("torch.distributed.checkpoint.optimizer"), "create_read_items_for_chunk_list"),
    (dcp, "load_sharded_optimizer_state_dict"),
    (importlib.import_module("torch.distributed.checkpoint.optimizer"), "load_sharded_optimizer_state_dict"),
    (importlib.import_module("torch.distributed.checkpoint.format_utils"), "FileSystemReader"),
]


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
    return isinstance(value, (type, types.FunctionType)) and value.__module__.startswith("dcp_fast")


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
    assert ours(dcp.FileSystemReader)


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
    original = framework.Reader
    before = dcp_fast.last_report()
    with dcp_fast.install():
        assert framework.Reader is dcp_fast.FileSystemReader
        state = {"t": torch.zeros(3), "n": 0}
        framework.resume(state, tmp_path)
    assert dcp_fast.last_report() is not before
    assert image(state) == image(stored)
    assert framework.Reader is original
    assert framework.Derived.__bases__ == (original,)


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
        assert type(dcp.FileSystemReader(tmp_path)) is dcp_fast.FileSystemReader
        assert isinstance(filesystem.FileSystemReader(tmp_path), dcp_fast.FileSystemReader)
    assert not loaded_by_us()


def test_objects_that_exist_already_stay_what_they_are(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((3,), torch.float32)})
    reader, planner = dcp.FileSystemReader(tmp_path), dcp.DefaultLoadPlanner()
    with dcp_fast.install():
        assert type(reader).__module__.startswith("torch")
        before = dcp_fast.last_report()
        state = {"t": torch.zeros(3)}
        dcp.load(state, storage_reader=reader, planner=planner)
        assert dcp_fast.last_report() is before
        assert state["t"].count_nonzero() > 0
        # They are still instances of what the names stand for, or code that asks would take another path.
        assert isinstance(planner, default_planner.LoadPlanner)


def test_fsspec_reader_is_untouched(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    module = importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")
    stored = {"t": fill((3,), torch.float32), "n": 4}
    save(tmp_path, stored)
    bases = module.FsspecReader.__mro__
    with dcp_fast.install():
        assert module.FsspecReader.__mro__ == bases
        before = dcp_fast.last_report()
        state = {"t": torch.zeros(3), "n": 0}
        dcp.load(state, storage_reader=module.FsspecReader(str(tmp_path)))
        assert dcp_fast.last_report() is before
        assert image(state) == image(stored)


def test_planning_functions_are_used_by_torchs_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"t": fill((3,), torch.float32)})
    planner = dcp.DefaultLoadPlanner()
    with dcp_fast.install():
        assert default_planner.create_default_local_load_plan is dcp_fast.planning.search.create_default_local_load_plan
        state = {"t": torch.zeros(3)}
        dcp.load(state, checkpoint_id=tmp_path, planner=planner)
        assert state["t"].count_nonzero() > 0


def test_type_checks_keep_their_meaning(tmp_path: Path) -> None:
    reader, planner_class, base = dcp.FileSystemReader(tmp_path), dcp.DefaultLoadPlanner, dcp.FileSystemReader

    class Derived(planner_class):  # type: ignore[misc,valid-type]
        pass

    huggingface = importlib.import_module("torch.distributed.checkpoint.hf_storage").HuggingFaceStorageReader
    with dcp_fast.install():
        assert dcp.FileSystemReader is dcp_fast.FileSystemReader
        assert isinstance(reader, dcp.FileSystemReader)
        assert issubclass(huggingface, dcp.FileSystemReader)
        assert isinstance(Derived(), dcp.DefaultLoadPlanner)
        assert not isinstance(reader, dcp.DefaultLoadPlanner)
        # New classes, of which torch's abstract classes have not been asked before.
        other = type("Other", (dcp.StorageReader,), {})
        assert not issubclass(other, dcp.FileSystemReader)
        assert not issubclass(type("Other", (), {}), base)
        assert not isinstance(3, dcp.StorageReader)
        assert not isinstance(huggingface, dcp.FileSystemReader)
        assert issubclass(type("Protocolled", (dcp.FileSystemReader, Stateful), {}), base)
        assert isinstance(dcp.FileSystemReader(tmp_path), base)

        class Ours(dcp.FileSystemReader):
            pass

        assert not isinstance(reader, Ours)
    assert not isinstance(reader, dcp_fast.FileSystemReader)
    assert not issubclass(huggingface, dcp_fast.FileSystemReader)
