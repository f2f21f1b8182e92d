"""What other versions of torch and Python wrote is loaded by those that run here; see tests/all_torches."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers import fast_reader, image, torch_load, torch_reader
from inert_values import facts
from ranks import Ranks
from torch.distributed.checkpoint.api import CheckpointException

import dcp_fast
from torches.checkpoints import KINDS, running

Outcome = str | None  # None: equal to what was stored


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    written: Path | None = metafunc.config.getoption("--written")
    by_load = "load" in metafunc.fixturenames
    cases = []
    for about in sorted(written.glob("*/about.json")) if written else ():
        for name in json.loads(about.read_text())["kinds"]:
            for load in KINDS[name].all_loads() if by_load else [None]:
                parameters = (about.parent, name, load) if by_load else (about.parent, name)
                cases.append(pytest.param(*parameters, id="-".join(filter(None, [about.parent.name, name, load]))))
    metafunc.parametrize(("folder", "name", "load") if by_load else ("folder", "name"), cases)


def writer_of(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The versions of torch and Python, as two numbers each."""
    about = json.loads((folder / "about.json").read_text())
    torch_version, python_version = (about[key].split(".")[:2] for key in ("torch", "python"))
    return tuple(map(int, torch_version)), tuple(map(int, python_version))


def why_torch_cannot(folder: Path, name: str) -> str | None:
    """Why the torch that runs here does not even read the metadata, where that is so."""
    torch_version, python_version = writer_of(folder)
    if torch_version >= (2, 15) > running() and KINDS[name].tensors:
        return "before 2.15 properties of tensors have no strides"
    if python_version >= (3, 13) > sys.version_info[:2]:
        return "metadata has the path of the checkpoint, and its class is in pathlib._local, a module of Python 3.13"
    return None


def same(one: Any, other: Any) -> bool:
    return bool(facts(one) == facts(other) if isinstance(one, dict) else image(one) == image(other))


def load_both(path: str, name: str, load: str) -> tuple[Outcome, Outcome, dict[str, Any]]:
    """On a rank: what dcp_fast's load and torch's came to, and dcp_fast's report."""
    make = KINDS[name].all_loads()[load][1]
    wanted = make(True)
    assert not same(make(False), wanted)

    def run(function: Any, **arguments: Any) -> Outcome:
        state = make(False)
        try:
            function(state, **arguments)
        except CheckpointException as error:
            return "; ".join(f"{type(each).__name__}: {each}" for each, _ in error.failures.values())
        wrong = [key for key in wanted if not same({key: state[key]}, {key: wanted[key]})]
        return f"other values of {wrong}" if wrong else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = run(dcp_fast.load, storage_reader=fast_reader(path))
        report = dcp_fast.last_report()
        theirs = run(torch_load, storage_reader=torch_reader(path))
    return ours, theirs, {"fallback": report.fallback_records, "reason": report.reader_fallback_reason}


def test_load(ranks: Ranks, folder: Path, name: str, load: str) -> None:
    kind = KINDS[name]
    cannot = why_torch_cannot(folder, name)
    for ours, theirs, report in ranks.run(kind.all_loads()[load][0], load_both, str(folder / name), name, load):
        assert ours is None
        assert report["reason"] == ""
        assert report["fallback"] == kind.fallback or kind.fallback is None
        assert (theirs is None) == (cannot is None), f"torch: {theirs}; expected: {cannot}"


def test_metadata(folder: Path, name: str) -> None:
    ours = dcp_fast.FileSystemReader(folder / name).read_metadata()
    if name == "plans":
        plans: Any = ours.all_local_plans  # type: ignore[attr-defined]
        assert {item.index.fqn for plan in plans for item in plan.items} == set(ours.state_dict_metadata)
    if why_torch_cannot(folder, name) is not None:
        with pytest.raises((ValueError, ModuleNotFoundError), match=r"too many values|pathlib\._local"):
            torch_reader(folder / name).read_metadata()
        return
    theirs = torch_reader(folder / name).read_metadata()
    for field in {field.name for field in dataclasses.fields(theirs)} - {"storage_meta"}:  # it has the load's own id
        assert getattr(ours, field) == getattr(theirs, field)
        assert getattr(theirs, field) == getattr(ours, field)
