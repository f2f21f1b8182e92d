"""tests/all_torches itself: what it chooses and says, and the checkpoints that this torch writes for others."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from torches import environments
from torches.checkpoints import KINDS, running, write
from torches.environments import SUPPORTED, Environment, chosen, interpreter
from torches.main import COUNTS, Row, main
from torches.test_each_by_each import load_both, why_torch_cannot


def test_choice() -> None:
    assert [each.torch for each in chosen(())] == [version for version, each in SUPPORTED.items() for _ in each]
    assert {each.python for each in chosen(())} == {"3.10", "3.11", "3.12", "3.13"}
    assert chosen(["2.15.0-3.13", "2.13.0"]) == [Environment("2.13.0", "3.12"), Environment("2.15.0", "3.13")]


def test_unknown_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["2.0.0", "2.15.0"]) == 2
    assert capsys.readouterr().out.startswith("not in the table: 2.0.0; there are 2.11.0, ")


def test_python_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr("torches.main.FOLDER", tmp_path)
    monkeypatch.setattr("torches.environments.SUPPORTED", {"2.15.0": ("3.99",)})
    assert main([]) == 1
    line, *_, row = capsys.readouterr().out.splitlines()[:4]
    assert line.endswith("there is no Python 3.99: put it in the path, or use pyenv")
    assert row.startswith("2.15.0   3.99    FAILED (environment)")


def test_interpreter() -> None:
    version = ".".join(platform.python_version_tuple()[:2])
    assert interpreter(version) is not None
    assert interpreter("3.99") is None


def test_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torches.main.FOLDER", tmp_path)
    (tmp_path / "logs").mkdir()
    row = Row(Environment("2.15.0", "3.13"))
    row.step(
        "tests", [sys.executable, "-c", "print('3 passed, 1 skipped in 2.50s'); print('2 passed in 0.1s (0:00:01)')"]
    )
    assert not row.failed
    row.step("cross", [sys.executable, "-c", "raise SystemExit(3)"])
    assert row.failed
    first, second = capsys.readouterr().out.splitlines()
    assert "tests        passed  3 passed, 1 skipped; 2 passed (" in first
    assert "cross        FAILED  see " in second
    assert COUNTS.findall("====== 1 failed, 2 passed in 3.00s ======") == ["1 failed, 2 passed"]


@pytest.mark.parametrize("name", ["values", "training", "plans"])
def test_checkpoints_of_this_torch(ranks: Ranks, tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    ranks.run(kind.ranks, write, str(tmp_path), name)
    about = {"torch": torch.__version__, "python": platform.python_version(), "kinds": [name]}
    (tmp_path / "about.json").write_text(json.dumps(about))
    assert why_torch_cannot(tmp_path, name) is None
    for load, (count, _) in kind.all_loads().items():
        for ours, theirs, _ in ranks.run(count, load_both, str(tmp_path / name), name, load):
            assert ours is None
            assert theirs is None


def test_kinds_that_this_torch_cannot_write_are_loaded_otherwise() -> None:
    for kind in KINDS.values():
        assert kind.all_loads()
        assert ("as it was saved" in kind.all_loads()) == (running() >= kind.since)
